"""Infer splits and classes from folder names: train/, val/ and test/ are splits, and other folders are classes."""

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from dataset import SPLITS, TRAIN, split_id

MAX_STRAY_FRACTION = 0.25  # of images outside the folders: of training images for classes, of all images for cat/train

Folders = dict[str, tuple[str, ...]]  # image -> folders that contain it


@dataclass
class Layout:
    """Split and class of each image. Images in `left_out` are not part of the dataset."""

    splits: dict[str, int] = field(default_factory=dict)  # image -> split id; empty if there are no split folders
    classes: dict[str, str] = field(default_factory=dict)  # image -> class name; empty if there are no class folders
    left_out: dict[str, str] = field(default_factory=dict)  # image -> reason


def read_layout(names: list[str]) -> Layout:
    """Infer the layout from the paths of all images.

    If there are split folders, images outside them are left out. Folders are read as classes only if at most
    MAX_STRAY_FRACTION of the training images are outside them; images outside are then left out. Inner split folders
    (cat/train) are read as splits only if at most MAX_STRAY_FRACTION of all images are outside them.
    """
    return _read_splits({name: PurePosixPath(name).parent.parts for name in names})


def _read_splits(folders: Folders) -> Layout:
    """Look for split folders, and for class folders inside them."""
    folders = _without_shared(folders)
    for depth in (0, 1):  # train/cat or cat/train
        ids = {name: split_id(parts[depth]) for name, parts in folders.items() if len(parts) > depth}
        splits = {name: split for name, split in ids.items() if split is not None}
        most_have_split = len(folders) - len(splits) <= MAX_STRAY_FRACTION * len(folders)
        if len(set(splits.values())) > 1 and (depth == 0 or most_have_split):
            inner = {name: folders[name][:depth] + folders[name][depth + 1 :] for name in splits}
            layout = _read_classes(inner, {name for name, split in splits.items() if split == TRAIN})
            layout.splits = {name: split for name, split in splits.items() if name not in layout.left_out}
            layout.left_out |= {
                name: f"images in {parts[0]}/ next to the split folders" if parts else "images next to the split folders"
                for name, parts in folders.items()
                if name not in splits
            }
            return layout
    return _read_classes(folders, set(folders))


def _read_classes(folders: Folders, train: set[str]) -> Layout:
    """Read the outermost folders as classes and leave out stray images, which are in no folder.

    If too many training images (`train`) are stray, the folders are not classes. Other splits do not count, because test
    images often have no class folders.
    """
    folders = _without_shared(folders)
    stray = [name for name, parts in folders.items() if not parts]
    inside = {name: parts for name, parts in folders.items() if parts}
    if sum(name in train for name in stray) > MAX_STRAY_FRACTION * len(train):
        num_folders = len({parts[0] for parts in inside.values()})
        if num_folders > 1:
            print(
                f"note: the {num_folders} folders are not used as classes: {len(stray):,} of {len(folders):,} images "
                f"are in none of them"
            )
        return Layout()
    if len({parts[0] for parts in inside.values()}) > 1:
        layout = Layout(classes={name: unicodedata.normalize("NFC", parts[0]) for name, parts in inside.items()})
        for folder in sorted(set(layout.classes.values())):
            if SPLITS.keys() & re.split(r"[\W_\d]+", folder.casefold()):
                print(f"note: folder {folder}/ is read as a class, not as a split, because other folders are not splits")
    else:
        layout = _read_splits(inside) if stray else Layout()
    if layout.splits or layout.classes:
        layout.left_out |= {name: "images next to the class folders" for name in stray}
    return layout


def _without_shared(folders: Folders) -> Folders:
    """Remove the outer folders that all images share; zips often have one folder around everything."""
    num_shared = len(os.path.commonprefix(list(folders.values())))
    return {name: parts[num_shared:] for name, parts in folders.items()}


def describe_left_out(left_out: dict[str, str]) -> dict[str, int]:
    """Return reason -> number of images. The reason is followed by the first image as an example."""
    first = {reason: name for name, reason in reversed(left_out.items())}
    return {f"{reason} ({first[reason]})": n for reason, n in Counter(left_out.values()).items()}
