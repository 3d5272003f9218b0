"""Load and validate a Config from YAML and overrides, and format --help."""

import difflib
import re
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from config import Config
from utils.errors import UserError

NULLS = ("", "null")  # a text setting with one of these values is None
DEFAULT_CONFIG = "configs/celeba64.yaml"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a float (YAML 1.1 requires 1.0e-4). Rejects duplicate keys, and base 8 and 60."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        """Reject numbers that YAML 1.1 reads in base 8 (010 is 8) or 60 (1:30 is 90)."""
        if re.match(r"[-+]?(0[0-9_]|.*:)", node.value):
            raise ValueError(f"{node.value} is ambiguous: write it without leading zeros or colons")
        is_int = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(path: str | Path | None, overrides: list[str] = ()) -> Config:
    """Read a YAML file on top of its `base:` file, apply section.key=value overrides, and validate.

    A single UserError lists all bad keys and values.
    """
    tree = _read_with_base(Path(path)) if path else {}
    annotations = {name: field.annotation for name, field in walk(Config)}
    for override in overrides:
        key, text = override.split("=", 1)
        annotation = annotations.get(key, Any)
        try:
            # Text is not parsed as YAML, because a path may contain " #" or ": ".
            types = _types(annotation)
            is_structure = (list in types or dict in types) and text.lstrip().startswith(("[", "{"))
            is_text = str in types and not is_structure and text not in NULLS
            value = text if is_text else _load_yaml(text, annotation)
        except (yaml.YAMLError, TypeError, ValueError) as error:
            reason = f" ({error})" if isinstance(error, ValueError) else ""
            raise UserError(f"{key}: cannot read the value {text!r}{reason}") from None
        section = tree
        *section_names, name = key.split(".")
        for section_name in section_names:
            section = section.setdefault(section_name, {})
            if not isinstance(section, dict):
                raise UserError(f"{key}: {section_name} is a value, not a section")
        section[name] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_describe(error)) from None


def _load_yaml(text: str, annotation) -> Any:
    """Parse YAML for a setting of this type. Values of text settings stay strings, because 010, no and 1e3 may be names."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _keep_text(node, annotation)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _keep_text(node: yaml.Node, annotation, keep_null: bool = True) -> None:
    """Tag the YAML scalars of text settings as strings, so that YAML does not convert them.

    keep_null: read null as None. False inside lists and mappings: there, null is text, which may be the name of a class.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for key_node, value_node in node.value if isinstance(node, yaml.MappingNode) else ():
            if field := annotation.model_fields.get(key_node.value if isinstance(key_node.value, str) else ""):
                _keep_text(value_node, field.annotation)
    elif isinstance(node, yaml.ScalarNode):
        if str in _types(annotation) and not (keep_null and node.tag == "tag:yaml.org,2002:null"):
            node.tag = "tag:yaml.org,2002:str"
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else [child for pair in node.value for child in pair]
        for child in children:
            _keep_text(child, annotation, keep_null=False)


def _types(annotation) -> list:
    """All types nested in an annotation, for example Union, list and str."""
    return [get_origin(annotation) or annotation, *(t for argument in get_args(annotation) for t in _types(argument))]


def _read_with_base(path: Path) -> dict:
    tree = _read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    base_tree = _read_yaml(path.parent / str(base))
    if "base" in base_tree:
        raise UserError(f"{path}: its base {base} has a base of its own, but only one level is supported")
    return _merge(base_tree, tree)


def _read_yaml(path: Path) -> dict:
    try:
        tree = _load_yaml(path.read_text(encoding="utf-8"), Config)
    except FileNotFoundError:
        configs = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        raise UserError(
            f"config {path} does not exist" + (f"; available: {', '.join(configs)}" if configs else "")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from None
    except (TypeError, ValueError) as error:  # e.g. a list as a key, an invalid date
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{position}: {getattr(error, 'problem', None) or 'not valid YAML'}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config must be a mapping of sections")
    return tree


def _merge(base: dict, changes: dict) -> dict:
    merged = dict(base)
    for name, value in changes.items():
        both_sections = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both_sections else value
    return merged


def _describe(error: ValidationError) -> str:
    """Return all validation errors in one line."""
    messages: dict[tuple[str, str], list[str]] = {}  # (key, value) -> one message per union member
    for entry in error.errors():
        # In the location of an error, pydantic mixes the names of union members with the parts of the key.
        union_member = r"^(literal|constrained|float|int|bool|str|dict|function|list)\b"
        key = ".".join(str(part) for part in entry["loc"] if not re.match(union_member, str(part)))
        value, message = f" (got {entry.get('input')!r})", entry["msg"].removeprefix("Value error, ")
        if entry["type"] == "extra_forbidden":
            value, message = "", f": unknown key{_suggestion(key)}"
        elif entry["type"] == "model_type":
            message = " must be a section"
        elif not key:  # from a validator of several keys: its message contains their values
            value = ""
        else:
            # "Input should be greater than 0" -> "must be greater than 0"
            message = " " + re.sub(r" after validation, not \d+$", "", re.sub(r"^\w+ should ", "must ", message))
        if message not in messages.setdefault((key, value), []):
            messages[key, value].append(message)
    return "; ".join(
        key + " or".join([first, *(other.replace(" must be", "", 1) for other in others)]) + value
        for (key, value), (first, *others) in messages.items()
    )


def _suggestion(key: str) -> str:
    """Suggest a similar key from the same section or, if the section has no similar key, from all sections."""
    section, _, name = key.rpartition(".")
    known = [known_key for known_key, _ in walk(Config)] + ([] if section else list(Config.model_fields))
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    candidates = [
        *(k for sibling, k in siblings.items() if name in sibling.split("_")),
        *(siblings[sibling] for sibling in difflib.get_close_matches(name, siblings, n=1, cutoff=0.65)),
        *difflib.get_close_matches(key, known, n=1, cutoff=0.8),
        *(k for k in known if k.rpartition(".")[2] == name),
    ]
    return f", did you mean {candidates[0]}?" if candidates else "; --help lists all keys"


def walk(model: type[BaseModel], prefix: str = ""):
    """Yield (dotted name, field) for every key."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from walk(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def help_text(doc: str) -> str:
    lines = [
        doc.strip(),
        "",
        f"usage: python {Path(sys.argv[0]).name} [CONFIG] [section.key=value ...] [--dry-run] [--help]",
        f"CONFIG is a YAML file, by default {DEFAULT_CONFIG}. With `base: other.yaml` it changes settings of another file.",
        "--dry-run checks settings, files, disk space and memory, prints the plan and exits.",
        "",
        "settings: key = default   [type or choices]",
    ]
    previous_section = None
    for name, field in walk(Config):
        section = name.rpartition(".")[0]
        if section != previous_section:
            lines.append("")
        previous_section = section
        lines.append(f"  {name} = {_yaml_text(field.default)}   [{_type_name(field.annotation)}]")
        lines += textwrap.wrap(field.description, 110, initial_indent=6 * " ", subsequent_indent=6 * " ")
    return "\n".join(lines)


def _type_name(annotation) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is Annotated:
        return _type_name(args[0])
    if origin is list:
        return f"list of {_type_name(args[0])}"
    if origin is Union:
        return " | ".join("null" if arg is type(None) else _type_name(arg) for arg in args)
    return annotation.__name__


def _yaml_text(value) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
