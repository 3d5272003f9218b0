"""Read captions from metadata tables, from a .txt or .caption file per image, or from COCO annotations."""

import json
import re
import unicodedata
from pathlib import Path, PurePosixPath

from config import DataConfig
from dataset import SPLITS
from dataset.files import Files
from dataset.metadata import Metadata, clean_caption, read_tables, reject_missing
from utils.errors import UserError
from utils.files import first_line

TEXT_SUFFIXES = (".txt", ".caption")


def read_sidecars(files: Files, cfg: DataConfig) -> Metadata:
    """Read all metadata tables, and the captions of each image X.jpg from X.txt and X.caption (one caption per line)."""
    metadata = read_tables(files, cfg)
    sidecars: dict[str, list[str]] = {}  # path without suffix -> text files
    for name in files.file_stats:
        if PurePosixPath(name).suffix.lower() in TEXT_SUFFIXES:
            sidecars.setdefault(_without_suffix(name), []).append(name)
    for image in files.images:
        for path in sorted(sidecars.get(_without_suffix(image), []), reverse=True):  # .txt before .caption
            texts = metadata.texts.setdefault(image, [])
            texts += [text for text in _nonempty_lines(files.read_text(path)) if text not in texts]
            metadata.file_stats.append([path, files.file_stats[path]])
    return metadata


def _without_suffix(name: str) -> str:
    """Return a path without its suffix, in Unicode NFC, because macOS may store "é" as two code points (NFD)."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name).with_suffix("")))


def _nonempty_lines(content: str) -> list[str]:
    return [clean_caption(line) for line in content.splitlines() if line.strip()]


def read_coco(files: Files) -> Metadata:
    """Read the captions and splits of COCO: annotations/captions_train2017.json describes the images in train2017/.

    The name of an annotation file gives the split, train or val. A file is ignored if none of its images exist.
    """
    annotation_files = [n for n in files.file_stats if re.fullmatch(r"captions_(train|val)\d*\.json", Path(n).name)]
    if not annotation_files:
        raise UserError(
            "data.path: no captions_train*.json or captions_val*.json in this folder or zip; "
            "for other captioned images use data.source=folder"
        )
    paths = {"/".join(PurePosixPath(n).parts[-2:]): n for n in files.images}  # "train2017/000000000009.jpg" -> path
    captions = Metadata(file_stats=[[name, files.file_stats[name]] for name in annotation_files])
    for name in annotation_files:
        subset = Path(name).stem.removeprefix("captions_")  # "train2017", also the folder of the images
        try:
            content = json.loads(files.read_text(name))
            image_names = {image["id"]: f"{subset}/{image['file_name']}" for image in content["images"]}
            texts: dict[str, list[str]] = {}
            for annotation in content["annotations"]:
                image_captions = texts.setdefault(image_names[annotation["image_id"]], [])
                image_captions.append(clean_caption(annotation["caption"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"data.path: {name} is not a COCO caption file ({first_line(error)})") from None
        missing = sorted(image for image in texts if image not in paths)
        if len(missing) == len(texts):
            print(f"note: {name} is ignored: none of its images exist")
            continue
        reject_missing(missing, name, "captions")
        captions.texts |= {paths[image]: text for image, text in texts.items()}
        captions.splits |= {paths[image]: SPLITS[re.match("train|val", subset)[0]] for image in texts}
    if not captions.texts:
        raise UserError("data.path: none of the images in COCO's annotations exist")
    return captions
