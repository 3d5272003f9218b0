"""Captions that come with pictures: captions.jsonl or .txt files beside them, and COCO's annotations."""

import json
import re
from pathlib import Path, PurePosixPath

from lab.artifacts import first_line
from lab.errors import UserError
from sources import HELD_OUT, TRAIN
from sources.files import Files

SPLITS = {"train": TRAIN, "val": HELD_OUT, "validation": HELD_OUT, "test": HELD_OUT}


def beside(files: Files) -> tuple[dict[str, list[str]], dict[str, int], list]:
    """(captions, splits, stamps) of the pictures of `files`, by picture; all empty where there are none.

    captions.jsonl or metadata.jsonl: a line per picture with file_name, and captions (a list), caption or text; optionally
    split (train, val, test). Else X.txt beside X.jpg, a caption a line. Raises UserError for a file that cannot be read
    and for captions of pictures that are not there.
    """
    captions, splits, stamps = {}, {}, []
    for name in files.stamps:
        if PurePosixPath(name).name in ("captions.jsonl", "metadata.jsonl"):
            theirs = _from_jsonl(files, name)
            captions, splits, stamps = captions | theirs[0], splits | theirs[1], [*stamps, [name, files.stamps[name]]]
    if captions:
        return captions, splits, stamps
    named = {image: str(PurePosixPath(image).with_suffix(".txt")) for image in files.images}
    found = {image: text for image, text in named.items() if text in files.stamps}
    captions = {image: _lines(files.read_text(text)) for image, text in found.items()}
    return captions, {}, [[text, files.stamps[text]] for text in found.values()]


def _from_jsonl(files: Files, name: str) -> tuple[dict[str, list[str]], dict[str, int]]:
    folder, images, captions, splits, missing = PurePosixPath(name).parent, set(files.images), {}, {}, []
    lines = files.read_text(name).split("\n")  # not splitlines: JSON may hold other separators inside a string
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            texts = entry.get("captions", entry.get("caption", entry.get("text")))
            image = str(folder / entry["file_name"])
            texts = [texts] if isinstance(texts, str) else texts
            if texts is None:
                continue  # a metadata.jsonl about something else
            captions[image] = [" ".join(str(text).split()) for text in texts]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"data.path: {name}, line {number}: not a file_name with its captions ({type(error).__name__}: {error})"
            ) from None
        if image not in images:
            missing.append(f"{image} (line {number})")
        if entry.get("split") in SPLITS:
            splits[image] = SPLITS[entry["split"]]
    _refuse(missing, name)
    return captions, splits


def _refuse(missing: list[str], name: str) -> None:
    if missing:
        others = f" and {len(missing) - 1} others that are" if len(missing) > 1 else ", which is"
        raise UserError(f"data.path: {name} has captions for {missing[0]}{others} not there")


def _lines(content: str) -> list[str]:
    return [" ".join(line.split()) for line in content.splitlines() if line.strip()]


def coco(files: Files) -> tuple[dict[str, list[str]], dict[str, int], list]:
    """The same from COCO's layout, as torchvision's CocoCaptions reads it: annotations/captions_train2017.json with train2017/,
    and val. An annotation file of whose pictures none are there is left out. Raises UserError."""
    annotations = [n for n in files.stamps if re.fullmatch(r"captions_(train|val)\d*\.json", Path(n).name)]
    if not annotations:
        raise UserError(
            "data.path: no captions_train*.json or captions_val*.json of COCO is there; other captioned pictures: data.source=folder"
        )
    by_end = {"/".join(PurePosixPath(n).parts[-2:]): n for n in files.images}  # "train2017/000000000009.jpg"
    captions, splits = {}, {}
    for name in annotations:
        kind = Path(name).stem.removeprefix("captions_")  # train2017
        try:
            content = json.loads(files.read_text(name))
            names = {image["id"]: f"{kind}/{image['file_name']}" for image in content["images"]}
            texts: dict[str, list[str]] = {}
            for annotation in content["annotations"]:
                texts.setdefault(names[annotation["image_id"]], []).append(" ".join(annotation["caption"].split()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"data.path: {name} is not as COCO writes it ({first_line(error)})") from None
        missing = sorted(picture for picture in texts if picture not in by_end)
        if len(missing) == len(texts):
            print(f"note: of the pictures of {name} none are there; it is left out")
            continue
        _refuse(missing, name)
        captions |= {by_end[picture]: text for picture, text in texts.items()}
        splits |= {by_end[picture]: SPLITS[re.match("train|val", kind)[0]] for picture in texts}
    if not captions:
        raise UserError("data.path: COCO's annotations are there and none of their pictures")
    return captions, splits, [[name, files.stamps[name]] for name in annotations]
