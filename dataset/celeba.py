"""Read CelebA's attributes (list_attr_celeba) and official split (list_eval_partition) from .txt or Kaggle's .csv files."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from dataset import TEST, TRAIN, VAL
from dataset.files import Files
from utils.errors import UserError
from utils.files import first_line, listed

PARTITION, ATTRIBUTES = "list_eval_partition", "list_attr_celeba"
SUFFIXES = (".txt", ".csv")
LIST_FOLDERS = (".", "Anno", "Eval")  # searched for the lists, relative to the two parent folders of data.path


@dataclass
class CelebALists:
    split: np.ndarray | None = None  # (N,) TRAIN, VAL or TEST, numbered as in list_eval_partition.txt
    labels: np.ndarray | None = None  # (N, K) int64
    label_names: dict[str, list[str]] = field(default_factory=dict)
    file_stats: list = field(default_factory=list)  # [path, SHA-256] of each list


def read_lists(files: Files, names: list[str]) -> CelebALists:
    """Read CelebA's lists for the images `names` from data.path or the two folders above it. A missing list gives None."""
    lists = CelebALists()
    if (partition := _read_list(files, PARTITION, lists)) is not None:
        split = np.array(_rows_of(names, partition, 1, PARTITION))[:, 0]
        if len(wrong := split[~np.isin(split, (TRAIN, VAL, TEST))]):
            raise UserError(f"{PARTITION}: a partition must be 0 (train), 1 (validation) or 2 (test) (got {wrong[0]})")
        lists.split = split.astype(np.uint8)
    else:
        print(f"note: no {PARTITION}.txt or .csv in or next to {files.path}: CelebA's official split is not used")
    if (attributes := _read_list(files, ATTRIBUTES, lists)) is not None:
        columns = attributes.pop("")
        lists.labels = (np.array(_rows_of(names, attributes, len(columns), ATTRIBUTES)) > 0).astype(np.int64)
        lists.label_names = {column.lower(): ["no", "yes"] for column in columns}
    return lists


def _read_list(files: Files, stem: str, lists: CelebALists) -> dict[str, list] | None:
    """Return image -> its numbers, or None if the list does not exist. The key "" holds the names of the attributes."""
    for name, content in _candidates(files, stem):
        lists.file_stats.append([name, hashlib.sha256(content.encode()).hexdigest()])
        rows = [line.replace(",", " ").split() for line in content.splitlines() if line.strip()]
        table: dict[str, list] = {}
        try:
            if name.endswith(".csv"):
                header, *rows = rows
                table = {"": header[1:]} if stem == ATTRIBUTES else {}
            elif stem == ATTRIBUTES:
                _, table[""], *rows = rows  # number of images; names of the attributes; one line per image
            return table | {image: [int(number) for number in numbers] for image, *numbers in rows}
        except ValueError as error:
            raise UserError(f"{name}: CelebA's list has an unexpected format ({first_line(error)})") from None
    return None


def _candidates(files: Files, stem: str):
    """Yield (path, content) of each .txt or .csv file named `stem`, first in data.path, then in the two folders above it."""
    for name in files.file_stats:
        if PurePosixPath(name).stem == stem and PurePosixPath(name).suffix in SUFFIXES:
            yield name, files.read_text(name)
    for parent in list(files.path.absolute().parents)[:2]:
        for path in (parent / folder / (stem + suffix) for folder in LIST_FOLDERS for suffix in SUFFIXES):
            if path.is_file():
                yield str(path), path.read_text(encoding="utf-8-sig", errors="replace")


def _rows_of(names: list[str], table: dict[str, list], length: int, stem: str) -> list[list]:
    """Return the row of each image. A .png image has the row of the .jpg file, because the lists name only .jpg files."""
    rows = [table.get(Path(n).name, table.get(Path(n).with_suffix(".jpg").name, ())) for n in names]
    missing = [name for name, row in zip(names, rows) if len(row) != length]
    if missing:
        raise UserError(f"{stem} has no complete line for {listed(missing)}")
    return rows
