"""Image sources: one function (DataConfig, seed) -> Source per kind of dataset. Source.read decodes images later."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

from config import DataConfig
from dataset import TRAIN, VAL, evenly_spaced, use_test_if_no_val
from dataset import synthetic_faces as faces
from dataset.captions import TEXT_SUFFIXES, read_coco, read_sidecars
from dataset.celeba import read_lists
from dataset.color import NUM_PROBED, check_value_range
from dataset.files import TABLE_SUFFIXES, Files, crop_and_resize, decode_image
from dataset.huggingface import read_dataset
from dataset.layout import describe_left_out, read_layout
from dataset.metadata import TABLE_NAMES, Metadata, label_columns
from utils.errors import UserError
from utils.files import first_line, listed
from utils.images import MODES


@dataclass
class Source:
    """A dataset before its N images are decoded."""

    names: list[str]  # (N,)
    read: Callable[[list[int]], list]  # indices -> (height, width, C) uint8 or an error message for each
    cache_key: list  # all that determines the pixels, except data.image_size, data.channels and data.crop
    split: np.ndarray | None = None  # (N,) TRAIN, VAL or TEST; None: no official split
    labels: np.ndarray | None = None  # (N, K) int64
    label_names: dict[str, list[str]] = field(default_factory=dict)  # K labels, each with the names of its values
    captions: list[list[str]] | None = None  # at least one per image
    account: str = ""  # line with the numbers of files found, used and skipped, which train_vae.py prints; "": none


def _source_from_files(files: Files, names: list[str], cfg: DataConfig) -> Source:
    sample = evenly_spaced(np.array(names, dtype=object), NUM_PROBED)
    check_value_range(sample, files.open, known=cfg.value_range is not None)

    def read_one(name: str):
        try:
            image = decode_image(files.read(name), cfg.channels, cfg.value_range)
            return crop_and_resize(image, cfg.crop_name, cfg.size)
        except Exception as error:  # Pillow raises many exception types on damaged files
            return f"{type(error).__name__}: {error}"

    return Source(
        names,
        read=lambda indices: [read_one(names[i]) for i in indices],
        cache_key=[cfg.value_range, [[n, files.file_stats[n]] for n in names]],
    )


def _add_captions(source: Source, metadata: Metadata) -> None:
    """Set captions and split. An image without a caption gets the empty caption."""
    texts, splits = ({n: table[n] for n in source.names if n in table} for table in (metadata.texts, metadata.splits))
    source.cache_key = [source.cache_key, metadata.file_stats]
    if any(texts.values()):
        source.captions = [texts.get(n) or [""] for n in source.names]
        _note_missing_captions(source)
    if splits:
        source.split = use_test_if_no_val(np.array([splits.get(n, TRAIN) for n in source.names], dtype=np.uint8))
        if num_missing := len(source.names) - len(splits):
            print(f"note: {num_missing:,} of {len(source.names):,} images have no split and are used for training")


def _note_missing_captions(source: Source) -> None:
    if source.captions and (num_missing := source.captions.count([""])):
        total = len(source.names)
        print(f"note: {num_missing:,} of {total:,} images have no caption and get the empty caption (null condition)")


def folder(cfg: DataConfig, seed: int) -> Source:
    """Any folder or zip of images. Folder names and metadata files give the split, labels and captions."""
    files = Files(cfg.path)
    layout, metadata = read_layout(files.images), read_sidecars(files, cfg)
    names = [n for n in files.images if n not in layout.left_out]
    if differing := [n for n, split in metadata.splits.items() if layout.splits.get(n, split) != split]:
        print(f"note: metadata file and folder give different splits for {listed(differing)}; the metadata file is used")
    metadata.splits = layout.splits | metadata.splits
    source = _source_from_files(files, names, cfg)
    _add_captions(source, metadata)
    source.labels, source.label_names = label_columns(metadata, cfg, names)
    source.cache_key = [source.cache_key, cfg.caption_column, cfg.label_column]
    if layout.classes and cfg.label_column is None and "class" not in source.label_names:
        classes = sorted(set(layout.classes.values()))
        column = np.array([[classes.index(layout.classes[n])] for n in names], dtype=np.int64)
        source.labels = column if source.labels is None else np.hstack([column, source.labels])
        source.label_names = {"class": classes} | source.label_names
    _note_unread_files(files)
    source.account = files.account(len(names), describe_left_out(layout.left_out))
    return source


def _note_unread_files(files: Files) -> None:
    """Print a note on files that look like captions or labels but are not read."""
    unread = [n for n in files.file_stats if Path(n).suffix.lower() in TABLE_SUFFIXES and n not in files.texts_read]
    stems = {str(Path(n).with_suffix("")) for n in files.images}
    names = dict.fromkeys(f"X{Path(n).suffix} next to X" if str(Path(n).with_suffix("")) in stems else n for n in unread)
    names = [n for n in names if not re.match("(readme|licen[sc]e)", Path(n).name.lower())]
    if names:
        known = ", ".join([*TABLE_NAMES, *(f"X{suffix}" for suffix in TEXT_SUFFIXES)])
        print(f"note: these files are not read: {listed(names, 5)}; captions and labels are read only from {known}")


def coco(cfg: DataConfig, seed: int) -> Source:
    """COCO captions: a folder or zip with annotations/, train2017/ and val2017/."""
    files = Files(cfg.path)
    captions = read_coco(files)
    names = [n for n in files.images if n in captions.texts]
    source = _source_from_files(files, names, cfg)
    _add_captions(source, captions)
    source.account = files.account(len(names), {"images without captions": len(files.images) - len(names)})
    return source


def celeba(cfg: DataConfig, seed: int) -> Source:
    """CelebA: img_align_celeba as a folder or zip; its attributes and official split are optional."""
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
    lists = read_lists(files, names)
    source.split, source.labels, source.label_names = lists.split, lists.labels, lists.label_names
    source.cache_key = [source.cache_key, lists.file_stats]
    source.account = files.account(len(names), {"images with other names": len(files.images) - len(names)})
    return source


def cifar10(cfg: DataConfig, seed: int) -> Source:
    """CIFAR-10 in torchvision's format; the official test set is the validation split."""
    if cfg.path is None:
        raise UserError(
            "data.path is not set: set it to the folder that contains cifar-10-batches-py; "
            "to download CIFAR-10 into this folder, add data.download=true"
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

    def read_one(i: int) -> np.ndarray:
        return crop_and_resize(Image.fromarray(pixels[i]).convert(MODES[cfg.channels]), "center", cfg.size)

    return Source(
        [f"{i:05d}" for i in range(len(pixels))],
        read=lambda indices: [read_one(i) for i in indices],
        cache_key=["cifar10", len(pixels)],
        split=np.repeat([TRAIN, VAL], [num_train, len(pixels) - num_train]).astype(np.uint8),
        labels=np.array([y for part in parts for y in part.targets], dtype=np.int64)[:, None],
        label_names={"class": list(parts[0].classes)},
    )


def synthetic_faces(cfg: DataConfig, seed: int) -> Source:
    """Procedural faces. The validation images have the indices that follow those of the training images."""
    num_val = max(8, round(cfg.val_fraction * cfg.num_images))
    indices = np.arange(cfg.num_images + num_val)
    return Source(
        [f"{i:06d}" for i in indices],
        read=lambda rows: list(faces.render(seed, np.asarray(rows), cfg.size[0])),
        # The hash of the code is included, because the code determines the images.
        cache_key=[hashlib.sha256(Path(faces.__file__).read_bytes()).hexdigest(), seed, len(indices)],
        split=np.where(indices < cfg.num_images, TRAIN, VAL).astype(np.uint8),
        labels=faces.labels(seed, indices),
        label_names={name: list(values) for name, values in faces.ATTRIBUTES.items()},
        captions=[[caption] for caption in faces.captions(seed, indices)],
    )


def huggingface(cfg: DataConfig, seed: int) -> Source:
    """A dataset of the Hugging Face hub, or local parquet, arrow and imagefolder files."""
    source = Source(**read_dataset(cfg))
    _note_missing_captions(source)
    return source


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
