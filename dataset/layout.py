"""Meaning of folders: train/, val/ and test/ are splits, and the folders below them, or the only ones, are classes."""

import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from dataset import SPLITS, TRAIN

MAX_STRAY_FRACTION = 0.25  # of images next to class folders; with more, the folders are not classes

Folders = dict[str, tuple[str, ...]]  # image -> folders that contain it


@dataclass
class Layout:
    """Splits and classes by image. An image in `left_out` has neither."""

    splits: dict[str, int] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # image -> reason


def read_layout(names: list[str]) -> Layout:
    """Interpret the folders of images. Stray images next to class folders, and anything next to split folders, are left out."""
    return _read_splits({name: PurePosixPath(name).parent.parts for name in names})


def _read_splits(folders: Folders) -> Layout:
    folders = _without_shared(folders)
    for depth in (0, 1):  # train/cat or cat/train
        split_of = {
            name: parts[depth] for name, parts in folders.items() if len(parts) > depth and parts[depth].casefold() in SPLITS
        }
        is_split = len({SPLITS[folder.casefold()] for folder in split_of.values()}) > 1
        if is_split and (depth == 0 or len(split_of) == len(folders)):
            splits = {name: SPLITS[folder.casefold()] for name, folder in split_of.items()}
            inner = {name: folders[name][:depth] + folders[name][depth + 1 :] for name in splits}
            layout = _read_classes(inner, {name for name, split in splits.items() if split == TRAIN})
            layout.splits = {name: split for name, split in splits.items() if name not in layout.left_out}
            layout.left_out |= {
                name: f"images in {parts[0]}/ next to the split folders" if parts else "images next to the split folders"
                for name, parts in folders.items()
                if name not in split_of
            }
            return layout
    return _read_classes(folders, set(folders))


def _read_classes(folders: Folders, train: set[str]) -> Layout:
    """Images without a class folder are stray if few of `train` are: test images often have no labels."""
    folders = _without_shared(folders)
    stray = [name for name, parts in folders.items() if not parts]
    inside = {name: parts for name, parts in folders.items() if parts}
    if sum(name in train for name in stray) > MAX_STRAY_FRACTION * len(train):
        num_folders = len({parts[0] for parts in inside.values()})
        if num_folders > 1:
            print(
                f"note: the {num_folders} folders are no classes: {len(stray):,} of {len(folders):,} images are in none of them"
            )
        return Layout()
    if len({parts[0] for parts in inside.values()}) > 1:
        layout = Layout(classes={name: unicodedata.normalize("NFC", parts[0]) for name, parts in inside.items()})
        for folder in {name for name in layout.classes.values() if name.casefold() in SPLITS}:
            print(f"note: folder {folder}/ is read as a class, because there is no second split folder")
    else:
        layout = _read_splits(inside) if stray else Layout()
    if layout.splits or layout.classes:
        layout.left_out |= {name: "images next to the class folders" for name in stray}
    return layout


def _without_shared(folders: Folders) -> Folders:
    """Remove the outer folders that all images share: zips often wrap everything in one."""
    num_shared = len(os.path.commonprefix(list(folders.values())))
    return {name: parts[num_shared:] for name, parts in folders.items()}


def describe_left_out(left_out: dict[str, str]) -> dict[str, int]:
    """Reason, with the first image -> number of images."""
    first = {reason: name for name, reason in reversed(left_out.items())}
    return {f"{reason} ({first[reason]})": n for reason, n in Counter(left_out.values()).items()}
