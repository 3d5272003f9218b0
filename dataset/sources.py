"""Image sources: functions (DataConfig, seed) -> Source, which lists the images of a dataset and reads them."""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

from config import DataConfig
from dataset import TRAIN, VAL
from dataset import synthetic_faces as faces
from dataset.captions import SPLITS, Captions, read_coco, read_sidecars
from dataset.files import Files, crop_and_resize, decode_image
from dataset.huggingface import read_dataset
from utils.errors import UserError
from utils.files import first_line


@dataclass
class Source:
    """A dataset whose images are not read yet: names, a function that reads images, split, labels and captions."""

    names: list[str]  # (N,)
    read: Callable[[list[int]], list]  # indices -> (size, size, 3) uint8 each, or an error message
    cache_key: list  # everything that the images depend on, except data.image_size and data.crop
    split: np.ndarray | None = None  # (N,) TRAIN, VAL or TEST; None: no official split
    labels: np.ndarray | None = None  # (N, K) int64
    label_names: dict[str, list[str]] = field(default_factory=dict)  # K labels, each with the names of its values
    captions: list[list[str]] | None = None  # at least one per image


def crop_name(cfg: DataConfig) -> str:
    """Return data.crop with "auto" resolved."""
    return cfg.crop if cfg.crop != "auto" else "ddim" if cfg.source == "celeba" else "square"


def _source_from_files(files: Files, names: list[str], cfg: DataConfig) -> Source:
    crop = crop_name(cfg)

    def read_one(name: str):
        try:
            return crop_and_resize(decode_image(files.read(name)), crop, cfg.image_size)
        except Exception as error:  # PIL raises almost any type on damaged files
            return f"{type(error).__name__}: {error}"

    return Source(
        names,
        read=lambda indices: [read_one(names[i]) for i in indices],
        cache_key=[[n, files.file_stats[n]] for n in names],
    )


def _add_captions(source: Source, captions: Captions) -> None:
    """Set the captions (empty for images without one) and the split of `source`."""
    if not captions.texts:
        return
    source.captions = [captions.texts.get(n) or [""] for n in source.names]
    source.cache_key = [source.cache_key, captions.file_stats]
    num_missing = sum(not captions.texts.get(n) for n in source.names)
    if num_missing:
        print(f"note: {num_missing:,} of {len(source.names):,} images have no caption and train the null condition")
    if captions.splits:
        source.split = np.array([captions.splits.get(n, TRAIN) for n in source.names], dtype=np.uint8)


def folder(cfg: DataConfig, seed: int) -> Source:
    """Any folder or zip of images; subfolders train/, val/, test/ become the split, and folders below them become class labels."""
    files = Files(cfg.path)
    source = _source_from_files(files, files.images, cfg)
    _add_captions(source, read_sidecars(files))
    parents = [Path(n).parent.parts for n in source.names]
    # Ignore folders that all images share: zips often wrap everything in one.
    num_shared = len(os.path.commonprefix(parents))
    subfolders = [parts[num_shared:] for parts in parents]
    if all(parts and parts[0] in SPLITS for parts in subfolders):
        if source.split is None:
            source.split = np.array([SPLITS[parts[0]] for parts in subfolders], dtype=np.uint8)
        subfolders = [parts[1:] for parts in subfolders]
    if all(subfolders) and len(classes := sorted({parts[0] for parts in subfolders})) > 1:
        source.labels = np.array([[classes.index(parts[0])] for parts in subfolders], dtype=np.int64)
        source.label_names = {"class": classes}
    return source


def coco(cfg: DataConfig, seed: int) -> Source:
    """COCO captions: a folder or zip with annotations/, train2017/ and val2017/."""
    files = Files(cfg.path)
    captions = read_coco(files)
    source = _source_from_files(files, [n for n in files.images if n in captions.texts], cfg)
    _add_captions(source, captions)
    return source


def celeba(cfg: DataConfig, seed: int) -> Source:
    """CelebA: img_align_celeba as a folder or zip; list_attr_celeba.txt and list_eval_partition.txt are optional."""
    if cfg.download:
        _download("CelebA", cfg.path, split="all")
    if cfg.path is None:
        raise UserError(
            "data.path is not set: set it to the folder or zip of img_align_celeba, "
            "or to a folder to download CelebA into with data.download=true"
        )
    files = Files(cfg.path)
    names = [n for n in files.images if re.fullmatch(r"\d{6}\.jpe?g|\d{6}\.png", Path(n).name)]
    if not names:
        raise UserError(
            f"data.path: {cfg.path} has no image named like CelebA's 000001.jpg; for other images use data.source=folder"
        )
    source = _source_from_files(files, names, cfg)
    lists = "list_eval_partition.txt", "list_attr_celeba.txt"
    partition, attributes = map(files.find_lines, lists)
    source.cache_key = [source.cache_key, [[n, stats] for n, stats in files.file_stats.items() if Path(n).name in lists]]
    try:
        if partition:
            # list_eval_partition.txt uses the same ids as TRAIN, VAL, TEST: 0, 1, 2
            split_ids = {line.split()[0]: int(line.split()[1]) for line in partition if line.strip()}
            source.split = np.array([split_ids.get(_celeba_key(n, split_ids), TRAIN) for n in names], dtype=np.uint8)
        if attributes:
            columns = attributes[1].split()
            values = {line.split()[0]: [int(v) > 0 for v in line.split()[1:]] for line in attributes[2:] if line.strip()}
            missing = [n for n in names if len(values.get(_celeba_key(n, values), ())) != len(columns)]
            if missing:
                raise UserError(
                    f"{cfg.path}: list_attr_celeba.txt has no complete line for {missing[0]} and {len(missing) - 1} others: "
                    f"use the complete file, or remove it to train without labels"
                )
            source.labels = np.array([values[_celeba_key(n, values)] for n in names], dtype=np.int64)
            source.label_names = {column.lower(): ["no", "yes"] for column in columns}
    except (IndexError, ValueError) as error:
        raise UserError(f"{cfg.path}: CelebA's list files have an unexpected format ({first_line(error)})") from None
    return source


def _celeba_key(name: str, table: dict) -> str:
    """Return the listed file name, which is .jpg even for .png images."""
    base = Path(name).name
    return base if base in table else Path(base).with_suffix(".jpg").name


def cifar10(cfg: DataConfig, seed: int) -> Source:
    """CIFAR-10 in torchvision's format; the official test set is the val split."""
    if cfg.path is None:
        raise UserError(
            "data.path is not set: set it to the folder that contains cifar-10-batches-py, "
            "or to a folder to download it into with data.download=true"
        )
    if cfg.download:
        _download("CIFAR10", cfg.path)
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(Path(cfg.path), train=train) for train in (True, False)]
    except RuntimeError:
        raise UserError(
            f"data.path: {cfg.path} has no complete cifar-10-batches-py; download it with data.download=true"
        ) from None
    pixels = np.concatenate([part.data for part in parts])  # (60000, 32, 32, 3)
    num_train = len(parts[0].data)
    return Source(
        [f"{i:05d}" for i in range(len(pixels))],
        read=lambda indices: [crop_and_resize(Image.fromarray(pixels[i]), "square", cfg.image_size) for i in indices],
        cache_key=["cifar10", len(pixels)],
        split=np.repeat([TRAIN, VAL], [num_train, len(pixels) - num_train]).astype(np.uint8),
        labels=np.array([y for part in parts for y in part.targets], dtype=np.int64)[:, None],
        label_names={"class": list(parts[0].classes)},
    )


def synthetic_faces(cfg: DataConfig, seed: int) -> Source:
    """Procedural faces; the val images have the indices after the training images."""
    if cfg.image_size < 16:
        raise UserError(f"data.image_size must be at least 16 for synthetic_faces (got {cfg.image_size})")
    num_val = max(8, round(cfg.val_fraction * cfg.num_images))
    indices = np.arange(cfg.num_images + num_val)
    return Source(
        [f"{i:06d}" for i in indices],
        read=lambda rows: list(faces.render(seed, np.asarray(rows), cfg.image_size)),
        # The hash of the code is included, because the code determines the images.
        cache_key=[hashlib.sha256(Path(faces.__file__).read_bytes()).hexdigest(), seed, len(indices)],
        split=np.where(indices < cfg.num_images, TRAIN, VAL).astype(np.uint8),
        labels=faces.labels(seed, indices),
        label_names={name: list(values) for name, values in faces.ATTRIBUTES.items()},
        captions=[[caption] for caption in faces.captions(seed, indices)],
    )


def huggingface(cfg: DataConfig, seed: int) -> Source:
    """A dataset of the Hugging Face hub, or local parquet, arrow and imagefolder files."""
    return Source(**read_dataset(cfg, crop_name(cfg)))


SOURCES = {
    "synthetic_faces": synthetic_faces,
    "folder": folder,
    "huggingface": huggingface,
    "celeba": celeba,
    "cifar10": cifar10,
    "coco": coco,
}


def _download(dataset: str, root: str | None, **options) -> None:
    """Run torchvision's download and report any failure in one line."""
    if root is None:
        raise UserError("data.path is not set: set it to a folder to download into")
    import torchvision.datasets

    try:
        getattr(torchvision.datasets, dataset)(Path(root), download=True, **options)
    except Exception as error:  # no network, quota of the file host, gdown missing, checksum
        raise UserError(
            f"torchvision cannot download {dataset} into {root} ({first_line(error)}); "
            f"download it manually and set data.path to it"
        ) from None
