"""Captions in captions.jsonl, in a .txt file per image, or in COCO annotations."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dataset import TRAIN, VAL
from dataset.files import Files
from utils.errors import UserError
from utils.files import first_line

SPLITS = {"train": TRAIN, "val": VAL, "validation": VAL, "test": VAL}


@dataclass
class Captions:
    """Captions and splits by image path; empty if there are none."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    file_stats: list = field(default_factory=list)  # [path, stats] of each caption file


def read_sidecars(files: Files) -> Captions:
    """Read captions.jsonl or metadata.jsonl; if there is none, X.txt for each image X.jpg, with one caption per line.

    Each line of a .jsonl file is an object with `file_name`; `captions` (a list), `caption` or `text`; and optionally `split`
    (train, val, test).
    """
    captions = Captions()
    for name in files.file_stats:
        if PurePosixPath(name).name in ("captions.jsonl", "metadata.jsonl"):
            texts, splits = _read_jsonl(files, name)
            captions.texts |= texts
            captions.splits |= splits
            captions.file_stats.append([name, files.file_stats[name]])
    if captions.texts:
        return captions
    text_paths = {image: str(PurePosixPath(image).with_suffix(".txt")) for image in files.images}
    text_paths = {image: path for image, path in text_paths.items() if path in files.file_stats}
    return Captions(
        texts={image: _nonempty_lines(files.read_text(path)) for image, path in text_paths.items()},
        file_stats=[[path, files.file_stats[path]] for path in text_paths.values()],
    )


def _read_jsonl(files: Files, name: str) -> tuple[dict[str, list[str]], dict[str, int]]:
    folder, images, texts, splits, missing = PurePosixPath(name).parent, set(files.images), {}, {}, []
    lines = files.read_text(name).split("\n")  # splitlines would also split at separators inside JSON strings
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            image_captions = entry.get("captions", entry.get("caption", entry.get("text")))
            image = str(folder / entry["file_name"])
            if image_captions is None:
                continue  # a metadata.jsonl without captions
            if isinstance(image_captions, str):
                image_captions = [image_captions]
            texts[image] = [" ".join(str(caption).split()) for caption in image_captions]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"data.path: {name}, line {number}: expected an object with file_name and captions "
                f"({type(error).__name__}: {error})"
            ) from None
        if image not in images:
            missing.append(f"{image} (line {number})")
        if entry.get("split") in SPLITS:
            splits[image] = SPLITS[entry["split"]]
    _reject_missing(missing, name)
    return texts, splits


def _reject_missing(missing: list[str], name: str) -> None:
    if missing:
        raise UserError(
            f"data.path: {name} has captions for images that do not exist: {missing[0]}"
            + (f" and {len(missing) - 1} others" if len(missing) > 1 else "")
            + ": add the images or remove their captions"
        )


def _nonempty_lines(content: str) -> list[str]:
    return [" ".join(line.split()) for line in content.splitlines() if line.strip()]


def read_coco(files: Files) -> Captions:
    """Read COCO's annotations/captions_train2017.json for train2017/, and the same for val.

    A file is ignored if none of its images exist.
    """
    annotation_files = [n for n in files.file_stats if re.fullmatch(r"captions_(train|val)\d*\.json", Path(n).name)]
    if not annotation_files:
        raise UserError(
            "data.path: no captions_train*.json or captions_val*.json in this folder or zip; "
            "for other captioned images use data.source=folder"
        )
    paths = {"/".join(PurePosixPath(n).parts[-2:]): n for n in files.images}  # "train2017/000000000009.jpg" -> path
    captions = Captions(file_stats=[[name, files.file_stats[name]] for name in annotation_files])
    for name in annotation_files:
        subset = Path(name).stem.removeprefix("captions_")  # train2017
        try:
            content = json.loads(files.read_text(name))
            image_names = {image["id"]: f"{subset}/{image['file_name']}" for image in content["images"]}
            texts: dict[str, list[str]] = {}
            for annotation in content["annotations"]:
                image_captions = texts.setdefault(image_names[annotation["image_id"]], [])
                image_captions.append(" ".join(annotation["caption"].split()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"data.path: {name} is not a COCO caption file ({first_line(error)})") from None
        missing = sorted(image for image in texts if image not in paths)
        if len(missing) == len(texts):
            print(f"note: {name} is ignored: none of its images exist")
            continue
        _reject_missing(missing, name)
        captions.texts |= {paths[image]: text for image, text in texts.items()}
        captions.splits |= {paths[image]: SPLITS[re.match("train|val", subset)[0]] for image in texts}
    if not captions.texts:
        raise UserError("data.path: none of the images in COCO's annotations exist")
    return captions
