"""Image sources: what pictures there are, and how one is read. data.py decodes them once and caches them.

Every source is a function (Data settings, seed) -> Source. Bad input raises UserError.
"""

import hashlib
import io
import os
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image, ImageOps

from config import Data
from lab.artifacts import first_line
from lab.errors import UserError
from sources import HELD_OUT, TRAIN, captions, synthetic_faces

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CELEBA_SIZE = (178, 218)
CELEBA_BOXES = {"ddim": (25, 57, 153, 185), "center140": (19, 39, 159, 179)}  # left, top, right, bottom of 178×218


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


# Files in a folder or a zip


class Files:
    """The files below a folder or in a zip, by relative name. Raises UserError if there is nothing there."""

    def __init__(self, path: str | None):
        if path is None:
            raise UserError("data.path is not set: name a folder or a zip of images")
        self.path = Path(path)
        if self.path.is_dir():
            self.zip = None
            found = sorted(p for p in self.path.rglob("*") if p.is_file())
            self.stamps = {p.relative_to(self.path).as_posix(): [p.stat().st_size, p.stat().st_mtime_ns] for p in found}
        elif zipfile.is_zipfile(self.path):
            try:
                self.zip = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError, ValueError) as error:
                raise UserError(f"data.path: {path} is a damaged zip ({first_line(error)})") from None
            self.stamps = {
                i.filename: [i.file_size, i.CRC]
                for i in sorted(self.zip.infolist(), key=lambda i: i.filename)
                if not i.is_dir()
            }
        else:
            raise UserError(
                f"data.path: {path} is not a folder or a zip" if self.path.exists() else f"data.path: {path} does not exist"
            )
        if not self.stamps:
            raise UserError(f"data.path: {path} is empty")
        # macOS puts a "__MACOSX/._name.jpg" beside every picture of a zip.
        self.images = [
            n for n in self.stamps if Path(n).suffix.lower() in IMAGE_SUFFIXES and not Path(n).name.startswith("._")
        ]
        if not self.images:
            kinds = sorted({Path(n).suffix.lower() or "no suffix" for n in self.stamps})
            raise UserError(
                f"data.path: {path} holds {len(self.stamps)} files and no image ({', '.join(kinds[:5])}); "
                f"images are {', '.join(sorted(IMAGE_SUFFIXES))}"
            )

    def read(self, name: str) -> bytes:
        return self.zip.read(name) if self.zip else (self.path / name).read_bytes()

    def read_text(self, name: str) -> str:
        """A file in UTF-8, with or without its mark. Raises UserError."""
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"data.path: {name} is not UTF-8 ({error})") from None
        except (
            OSError,
            RuntimeError,
            zipfile.BadZipFile,
            zlib.error,
            NotImplementedError,
        ) as error:  # no right, encrypted, damaged
            raise UserError(f"data.path: {name} cannot be read ({first_line(error)})") from None

    def find_text(self, basename: str) -> list[str] | None:
        """Lines of the file of this name, wherever it lies; None if there is none."""
        for name in self.stamps:
            if Path(name).name == basename:
                return self.read_text(name).splitlines()
        return None


def decode(content: bytes) -> Image.Image:
    """Bytes of any picture -> RGB, upright (EXIF), transparency over white, the first frame of an animation."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: PIL's own conversion to 8 bits clips
        values = np.asarray(image, dtype=np.float32)
        return Image.fromarray((values / (256 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def crop_and_resize(image: Image.Image, crop: str, size: int) -> np.ndarray:
    """RGB -> (size, size, 3) uint8. A named CelebA crop is scaled with the picture; a crop of the right size is not resampled."""
    width, height = image.size
    if crop in CELEBA_BOXES:
        scale = width / CELEBA_SIZE[0]
        if abs(height - scale * CELEBA_SIZE[1]) > 1:
            raise ValueError(
                f"data.crop={crop} is for CelebA's aligned {CELEBA_SIZE[0]}x{CELEBA_SIZE[1]} pictures, this one is {width}x{height}"
            )
        left, top, right, bottom = (int(edge * scale) for edge in CELEBA_BOXES[crop])
    else:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        right, bottom = left + side, top + side
    if (right - left, bottom - top) == (size, size):
        return np.asarray(image.crop((left, top, right, bottom)))
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, right, bottom)))


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
