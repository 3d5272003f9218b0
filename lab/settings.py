"""Reading settings: YAML file + `section.key=value` overrides -> a checked, frozen Config; and the text of --help."""

import difflib
import re
import sys
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from config import Config
from lab.errors import UserError

DEFAULT_CONFIG = "configs/celeba64.yaml"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a float (YAML 1.1 wants 1.0e-4) and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=deep)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is given twice", key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(path: str | Path | None, overrides: list[str] = ()) -> Config:
    """Read a YAML file (and the one `base:` it may name), apply "section.key=value" overrides, check everything.

    Raises UserError naming every unknown key, wrong type and out-of-range value at once.
    """
    tree = _read_with_base(Path(path)) if path else {}
    for override in overrides:
        dotted, text = override.split("=", 1)
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, TypeError, ValueError):
            raise UserError(f"{dotted}: cannot read the value {text!r}") from None
        place = tree
        *sections, last = dotted.split(".")
        for name in sections:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise UserError(f"{dotted}: {name} is a value, not a section")
        place[last] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems: dict[tuple[str, str], list[str]] = {}
        for e in error.errors():  # of a union one for each member
            dotted, message, given = _explain(e)
            if message not in problems.setdefault((dotted, given), []):
                problems[dotted, given].append(message)
        raise UserError(
            "; ".join(f"{dotted}{' or '.join(said)}{given}" for (dotted, given), said in problems.items())
        ) from None


def _read_with_base(path: Path) -> dict:
    tree = _read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    below = _read_yaml(path.parent / str(base))
    if "base" in below:
        raise UserError(f"{path}: its base {base} names a base of its own; one level is enough")
    return _merge(below, tree)


def _read_yaml(path: Path) -> dict:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        near = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        raise UserError(f"config {path} does not exist" + (f"; there are: {', '.join(near)}" if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from None
    except (TypeError, ValueError) as error:  # a list as a key, a date that is none
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: {getattr(error, 'problem', None) or 'not valid YAML'}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of sections")
    return tree


def _merge(below: dict, above: dict) -> dict:
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _explain(error: dict) -> tuple[str, str, str]:
    """Of one pydantic error "section.key: ", what is wrong, and " (got …)"."""
    # Members of a union put their own names into the location; the user's path is what the schema knows.
    members = r"^(literal|constrained|float|int|bool|str|dict|function|list)\b"
    path = [str(p) for p in error["loc"] if not re.match(members, str(p))]
    dotted = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = [name for name, _ in walk(Config)] + list(Config.model_fields)
        near = difflib.get_close_matches(dotted, known, n=1, cutoff=0.6)
        same_name = [name for name in known if name.split(".")[-1] == path[-1]]
        hint = near or same_name[:1]
        return f"{dotted}: ", "unknown key" + (f", did you mean {hint[0]}?" if hint else ""), ""
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return (f"{dotted}: ", message, f" (got {error.get('input')!r})") if dotted else ("", message, "")


def walk(model: type[BaseModel], prefix: str = ""):
    """Yield (dotted name, field) for every key of the schema, in order."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from walk(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def help_text(doc: str) -> str:
    """The script's own words, how to call it, and every key with type, default and meaning."""
    lines = [
        doc.strip(),
        "",
        f"usage: python {Path(sys.argv[0]).name} [CONFIG] [section.key=value ...] [--dry-run]",
        f"CONFIG defaults to {DEFAULT_CONFIG}. --dry-run checks everything and prints the plan.",
        "",
    ]
    for name, field in walk(Config):
        lines.append(f"  {name} = {_yaml_text(field.default)}   [{_type_name(field.annotation)}]")
        lines.append(f"      {field.description}")
    return "\n".join(lines)


def _type_name(annotation) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(args)
    if origin is Annotated:
        return _type_name(args[0])
    if origin is list:
        return f"list of {_type_name(args[0])}"
    if origin is Union:
        return " | ".join("null" if a is type(None) else _type_name(a) for a in args)
    return annotation.__name__


def _yaml_text(value) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
