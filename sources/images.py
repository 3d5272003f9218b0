"""Image sources: what pictures there are, and how one is read. data.py decodes them once and caches them.

Every source is a function (Data settings, seed) -> Source. Bad input raises UserError.
"""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

from config import Data
from lab.artifacts import first_line
from lab.errors import UserError
from sources import HELD_OUT, TRAIN, captions, synthetic_faces
from sources.files import Files, crop_and_resize, decode


@dataclass
class Source:
    """Pictures that can be read, before any is. `read` takes indices and gives for each a (size, size, 3) uint8 array, or
    the reason (a string) why it cannot be read."""

    names: list[str]
    read: Callable[[list[int]], list]
    key: list  # what pictures, split, labels and captions depend on beside size and crop: names, sizes, times
    split: np.ndarray | None = None  # (N,) TRAIN, HELD_OUT or TEST; None: the source has no split of its own
    labels: np.ndarray | None = None  # (N, K) int64
    label_names: dict[str, list[str]] = field(default_factory=dict)  # attribute -> names of its values, one per column
    captions: list[list[str]] | None = None  # of each picture, at least one


def _reader(files: Files, names: list[str], crop: str, size: int) -> Callable[[list[int]], list]:
    def read_one(name: str):
        try:
            return crop_and_resize(decode(files.read(name)), crop, size)
        except Exception as error:  # PIL's plugins raise nearly everything on damaged files; each is named in the report
            return f"{type(error).__name__}: {error}"

    return lambda indices: [read_one(names[i]) for i in indices]


def crop_of(data: Data) -> str:
    """What data.crop=auto stands for."""
    return data.crop if data.crop != "auto" else "ddim" if data.source == "celeba" else "square"


def folder(data: Data, seed: int) -> Source:
    """Any folder or zip of pictures; class subfolders, where all pictures lie in some, become labels, and train/, val/, test/ above
    them the split. Captions beside them."""
    files = Files(data.path)
    names = files.images
    source = Source(
        names,
        _reader(files, names, crop_of(data), data.image_size),
        key=[[n, files.stamps[n]] for n in names],
    )
    _caption(source, *captions.beside(files))
    parents = [Path(n).parent.parts for n in names]
    # A zip often has one folder around everything: what all names share is no class.
    shared = len(os.path.commonprefix(parents))
    below = [parts[shared:] for parts in parents]
    if all(parts and parts[0] in captions.SPLITS for parts in below):
        if source.split is None:
            source.split = np.array([captions.SPLITS[parts[0]] for parts in below], dtype=np.uint8)
        below = [parts[1:] for parts in below]
    if all(below) and len(classes := sorted({parts[0] for parts in below})) > 1:
        source.labels = np.array([[classes.index(parts[0])] for parts in below], dtype=np.int64)
        source.label_names = {"class": classes}
    return source


def _caption(source: Source, texts: dict[str, list[str]], splits: dict[str, int], stamps: list) -> None:
    """Give the pictures of a source their captions, the empty one where they have none, and the split that comes with them."""
    if not texts:
        return
    source.captions = [texts.get(n) or [""] for n in source.names]
    source.key = [source.key, stamps]
    bare = sum(not texts.get(n) for n in source.names)
    if bare:
        print(f"note: {bare:,} of {len(source.names):,} pictures have no caption; they train what is drawn without one")
    if splits:
        source.split = np.array([splits.get(n, TRAIN) for n in source.names], dtype=np.uint8)


def coco(data: Data, seed: int) -> Source:
    """COCO's captioned pictures as torchvision's CocoCaptions has them: annotations/ beside train2017/ and val2017/, a folder or a zip."""
    files = Files(data.path)
    texts, splits, stamps = captions.coco(files)
    names = [n for n in files.images if n in texts]
    source = Source(
        names,
        _reader(files, names, crop_of(data), data.image_size),
        key=[[n, files.stamps[n]] for n in names],
    )
    _caption(source, texts, splits, stamps)
    return source


def celeba(data: Data, seed: int) -> Source:
    """CelebA's img_align_celeba as a folder or zip, with list_attr_celeba.txt and list_eval_partition.txt where present."""
    if data.download:
        _download("CelebA", data.path, split="all")
    if data.path is None:
        raise UserError(
            "data.path is not set: name the folder or zip of img_align_celeba, or a folder to download CelebA into with data.download=true"
        )
    files = Files(data.path)
    names = [n for n in files.images if re.fullmatch(r"\d{6}\.jpe?g|\d{6}\.png", Path(n).name)]
    if not names:
        raise UserError(
            f"data.path: {data.path} holds no picture named like CelebA's 000001.jpg; for other pictures use data.source=folder"
        )
    source = Source(
        names,
        _reader(files, names, "ddim" if data.crop == "auto" else data.crop, data.image_size),
        key=[[n, files.stamps[n]] for n in names],
    )
    lists = "list_eval_partition.txt", "list_attr_celeba.txt"
    partition, attributes = map(files.find_text, lists)
    source.key = [source.key, [[n, stamp] for n, stamp in files.stamps.items() if Path(n).name in lists]]
    try:
        if partition:
            number = {line.split()[0]: int(line.split()[1]) for line in partition if line.strip()}  # 0 train, 1 val, 2 test
            source.split = np.array([number.get(_celeba_id(n, number), TRAIN) for n in names], dtype=np.uint8)
        if attributes:
            columns = attributes[1].split()
            values = {line.split()[0]: [int(v) > 0 for v in line.split()[1:]] for line in attributes[2:] if line.strip()}
            missing = [n for n in names if len(values.get(_celeba_id(n, values), ())) != len(columns)]
            if missing:
                raise UserError(
                    f"{data.path}: list_attr_celeba.txt has no whole line for {missing[0]} and {len(missing) - 1} others"
                )
            source.labels = np.array([values[_celeba_id(n, values)] for n in names], dtype=np.int64)
            source.label_names = {column.lower(): ["no", "yes"] for column in columns}
    except (IndexError, ValueError) as error:
        raise UserError(f"{data.path}: CelebA's lists are not as they should be ({first_line(error)})") from None
    return source


def _celeba_id(name: str, table: dict) -> str:
    """The lists say .jpg even where the pictures are .png."""
    base = Path(name).name
    return base if base in table else Path(base).with_suffix(".jpg").name


def cifar10(data: Data, seed: int) -> Source:
    """CIFAR-10 in torchvision's format (cifar-10-batches-py); the official test set is held out. Checksums are torchvision's."""
    if data.path is None:
        raise UserError(
            "data.path is not set: name the folder that holds cifar-10-batches-py, or one to download it into with data.download=true"
        )
    if data.download:
        _download("CIFAR10", data.path)
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(Path(data.path), train=train) for train in (True, False)]
    except RuntimeError:
        raise UserError(
            f"data.path: {data.path} holds no whole cifar-10-batches-py; get it with data.download=true"
        ) from None
    pixels = np.concatenate([part.data for part in parts])  # (60000, 32, 32, 3)
    train_count = len(parts[0].data)

    def read(indices: list[int]) -> list:
        return [crop_and_resize(Image.fromarray(pixels[i]), "square", data.image_size) for i in indices]

    return Source(
        [f"{i:05d}" for i in range(len(pixels))],
        read,
        key=["cifar10", len(pixels)],
        split=np.repeat([TRAIN, HELD_OUT], [train_count, len(pixels) - train_count]).astype(np.uint8),
        labels=np.array([y for part in parts for y in part.targets], dtype=np.int64)[:, None],
        label_names={"class": list(parts[0].classes)},
    )


def portraits(data: Data, seed: int) -> Source:
    """Procedural faces; the held-out ones are the next indices after the training ones."""
    if data.image_size < 16:
        raise UserError(f"data.image_size: synthetic_faces are drawn at 16 pixels or more, not {data.image_size}")
    held_out = max(8, round(data.holdout * data.count))
    indices = np.arange(data.count + held_out)
    return Source(
        [f"{i:06d}" for i in indices],
        lambda chosen: list(synthetic_faces.render(seed, np.asarray(chosen), data.image_size)),
        # Drawn by code: when the code changes, so do the pictures.
        key=[hashlib.sha256(Path(synthetic_faces.__file__).read_bytes()).hexdigest(), seed, len(indices)],
        split=np.where(indices < data.count, TRAIN, HELD_OUT).astype(np.uint8),
        labels=synthetic_faces.labels(seed, indices),
        label_names={name: list(values) for name, values in synthetic_faces.ATTRIBUTES.items()},
        captions=[[caption] for caption in synthetic_faces.captions(seed, indices)],
    )


SOURCES = {"synthetic_faces": portraits, "folder": folder, "celeba": celeba, "cifar10": cifar10, "coco": coco}


def _download(dataset: str, root: str | None, **options) -> None:
    """torchvision's own download, its many ways of failing put into one line."""
    if root is None:
        raise UserError("data.path is not set: name a folder to download into")
    import torchvision.datasets

    try:
        getattr(torchvision.datasets, dataset)(Path(root), download=True, **options)
    except Exception as error:  # no network, quota of the file host, gdown missing, checksum
        raise UserError(
            f"torchvision cannot download {dataset} into {root} ({first_line(error)}); "
            f"download it by hand and name it with data.path"
        ) from None
