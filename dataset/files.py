"""List the files of a folder or zip; decode, crop and resize images."""

import contextlib
import io
import os
import stat
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dataset.color import to_8_bit_srgb
from utils.errors import UserError
from utils.files import first_line, printable
from utils.images import MODES, over_white

IMAGE_SUFFIXES = set(".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .avif .ppm .pgm .pbm .pnm .jp2 .tga".split())
# A file with another suffix, or without one, is an image if Pillow recognizes its content as one of these formats.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "PSD", "QOI", "SGI", "DDS", "AVIF")
TABLE_SUFFIXES = set(".txt .caption .json .jsonl .csv .tsv .xml .yaml .yml .parquet".split())  # labels and captions
RAW_SUFFIXES = set(".dng .nef .cr2 .arw .orf .rw2 .pef .srw".split())  # Pillow would read only the thumbnail
# Files and folders, in lower case, that operating systems, network drives and archive programs create
SYSTEM_NAMES = set(
    "__macosx thumbs.db ehthumbs.db desktop.ini icon\r $recycle.bin recycler recycled #recycle @recycle #snapshot ~snapshot "
    "@recently-snapshot @eadir @tmp @__thumb lost+found lost.dir found.000 __pycache__".split(" ")
) | {"system volume information", "network trash folder", "temporary items"}
UNFINISHED_OR_BACKUP_SUFFIXES = (".part", ".partial", ".crdownload", ".download", ".tmp", ".bak", "~")
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
CELEBA_SIZE = (178, 218)
CELEBA_BOXES = {"ddim": (25, 57, 153, 185), "center140": (19, 39, 159, 179)}  # left, top, right, bottom in a 178×218 image


class Files:
    """Files of a folder or zip by relative path, without hidden and system files. Raises UserError if none is an image.

    Bytes of a path that are not UTF-8 are escaped, so that paths can be printed. A folder and a zip made from it give the
    same paths in the same order.
    """

    def __init__(self, path: str | None):
        if path is None:
            raise UserError("data.path is not set: set it to a folder or zip of images")
        self.path, self.zip = Path(path), None
        require_valid_path(path)
        self.skipped: Counter[str] = Counter()  # reason -> number of files
        self.texts_read: set[str] = set()  # files read with read_text()
        if self.path.is_dir():
            entries = self._list_folder()
        elif self.path.is_file() and zipfile.is_zipfile(self.path):
            entries = self._list_zip()
        else:
            problem = "is not a folder or a zip" if self.path.exists() else "does not exist"
            raise UserError(f"data.path: {path} {problem}")
        self._entries = dict(sorted(entries.items(), key=lambda item: item[0].split("/")))  # path -> Path or ZipInfo
        self.file_stats = {name: _stats(entry) for name, entry in self._entries.items()}
        self.images = [name for name in self._entries if self._is_image(name)]
        if not self.images:
            if not self._entries and not self.skipped:
                raise UserError(f"data.path: {path} is empty")
            suffixes = sorted({PurePosixPath(n).suffix.lower() or "no suffix" for n in self._entries})
            raise UserError(
                f"data.path: {path} has {self.num_found} files but no image; "
                f"found: {', '.join([*suffixes[:5], *self.skipped])}; supported: {', '.join(sorted(IMAGE_SUFFIXES))}"
            )

    @property
    def num_found(self) -> int:
        return len(self._entries) + self.skipped.total()

    def _list_folder(self) -> dict[str, Path]:
        entries = {}
        for path in self._walk(self.path, ()):
            name = path.relative_to(self.path).as_posix()
            if is_system_file(name):
                self.skipped["hidden or system files"] += 1
            else:
                if printable(name) in entries:
                    self.skipped["files whose escaped name equals that of another file"] += 1
                entries[printable(name)] = path
        return entries

    def _walk(self, folder: Path, parents: tuple) -> Iterator[Path]:
        """Yield all files below a folder. Follows symbolic links, except those that lead back to a parent."""
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in parents:
                self.skipped["links to a parent folder"] += 1
                return
            for entry in os.scandir(folder):
                path = folder / entry.name
                target = path if entry.is_symlink() else entry  # for a link to itself, DirEntry.is_dir() would raise
                if target.is_dir():
                    yield from self._walk(path, (*parents, (status.st_dev, status.st_ino)))
                elif target.is_file():
                    yield path
                else:
                    self.skipped["broken links" if entry.is_symlink() else "special files"] += 1
        except PermissionError:
            self.skipped["folders without read permission"] += 1

    def _list_zip(self) -> dict[str, zipfile.ZipInfo]:
        try:
            self.zip = zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise UserError(f"data.path: {self.path} is a damaged zip ({first_line(error)})") from None
        entries = {}
        for entry in self.zip.infolist():
            name = zip_name(entry)
            if name.endswith("/") or not name:  # a folder, or a path of only "." and ".."
                continue
            if is_system_file(name):
                self.skipped["hidden or system files"] += 1
                continue
            if stat.S_ISLNK(entry.external_attr >> 16):
                self.skipped["links in the zip"] += 1
                continue
            if entry.flag_bits & 1 or entry.compress_type not in ZIP_METHODS:
                problem = "encrypted" if entry.flag_bits & 1 else f"compressed by method {entry.compress_type}"
                raise UserError(f"data.path: {printable(name)} in {self.path} is {problem}: unpack the zip into a folder")
            if printable(name) in entries:
                self.skipped["repeated names in the zip"] += 1
            entries[printable(name)] = entry
        return entries

    def _is_image(self, name: str) -> bool:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix.endswith(UNFINISHED_OR_BACKUP_SUFFIXES):
            return False
        if suffix in IMAGE_SUFFIXES or suffix in TABLE_SUFFIXES or suffix in RAW_SUFFIXES:
            return suffix in IMAGE_SUFFIXES
        try:
            with self.open(name) as file, Image.open(file, formats=FORMATS):
                return True
        except Image.DecompressionBombError:
            return True  # too many pixels: reported as damaged when it is decoded
        except Exception:  # Pillow raises many exception types on files that are not images
            return False

    def open(self, name: str) -> BinaryIO:
        entry = self._entries[name]
        return self.zip.open(entry) if self.zip else open(entry, "rb")

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def read_text(self, name: str) -> str:
        """Return the content of a UTF-8 file without its byte order mark."""
        self.texts_read.add(name)
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"data.path: {name} is not UTF-8 ({error})") from None
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:  # no read permission, or damaged
            raise UserError(f"data.path: {name} cannot be read ({first_line(error)})") from None

    def account(self, num_used: int, left_out: dict[str, int]) -> str:
        """Return one line that says how many files are images, hold captions or labels, or are skipped, and why.

        num_used: images of the dataset
        left_out: reason -> number of images that are not part of the dataset
        """
        others = self._entries.keys() - self.texts_read - set(self.images)
        suffixes = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in sorted(others))
        kinds = ", ".join(f"{n:,} {suffix}" for suffix, n in suffixes.most_common(5)) + (", …" if len(suffixes) > 5 else "")
        reasons = {**self.skipped, **left_out} | ({f"other files ({kinds})": len(others)} if others else {})
        skipped = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items() if n)
        return (
            f"{self.num_found:,} files found: {num_used:,} images, {len(self.texts_read):,} files with captions or labels, "
            f"{sum(reasons.values()):,} skipped" + (f": {skipped}" if skipped else "")
        )


def require_valid_path(path: str) -> None:
    """Raise UserError if a path cannot be looked up, for example because it is too long."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # not an error here: data.path may be a Hugging Face hub id
    except (OSError, ValueError) as error:
        raise UserError(f"data.path: {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None


def is_system_file(name: str) -> bool:
    return any(part.startswith(".") or part.casefold() in SYSTEM_NAMES for part in name.split("/"))


def zip_name(entry: zipfile.ZipInfo) -> str:
    """Return the path of a zip entry, decoded as the unzip program does.

    A path without the zip format's UTF-8 flag is decoded as UTF-8 if its bytes are valid UTF-8. Otherwise, it is decoded
    as UTF-8 with invalid bytes escaped if the zip was made on Unix, else as code page 437.
    """
    name = entry.filename
    if not entry.flag_bits & 0x800 and name == entry.orig_filename:  # neither a UTF-8 flag nor a Unicode path field
        content = name.encode("cp437")
        try:
            name = content.decode("utf-8")
        except UnicodeDecodeError:
            name = content.decode("utf-8", "surrogateescape") if entry.create_system == 3 else name
    name = name.replace("\\", "/")  # written by some Windows programs
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return "/".join(parts) + ("/" if name.endswith("/") else "")


def _stats(entry: Path | zipfile.ZipInfo) -> list[int]:
    """Return [size, modification time] of a file or [size, CRC] of a zip entry, to recognize changed files."""
    if isinstance(entry, zipfile.ZipInfo):
        return [entry.file_size, entry.CRC]
    status = entry.stat()
    return [status.st_size, status.st_mtime_ns]


def decode_image(content: bytes, channels: int = 3, value_range: list[float] | None = None) -> Image.Image:
    """Decode an image file to 8-bit gray (1 channel), RGB (3) or RGBA (4).

    EXIF rotation is applied. An animation gives its first frame. Except for RGBA, transparency is composited over white.

    value_range: see to_8_bit_srgb()
    """
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        start = f"it starts with {content[:30]!r}" if content else "it is empty"
        raise UnidentifiedImageError(f"not an image that Pillow can read: {start}") from None
    image.load()  # decode here, because suppress() below would hide errors in the pixel data
    with contextlib.suppress(Exception):  # damaged EXIF data raise many exception types
        ImageOps.exif_transpose(image, in_place=True)  # a copy would lose image.format, which to_8_bit_srgb() needs
    image = to_8_bit_srgb(image, value_range)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = image if channels == 4 else over_white(image)
    return image.convert(MODES[channels])


def crop_and_resize(image: Image.Image, crop: str, size: tuple[int, int]) -> np.ndarray:
    """Crop an image, resize it to size = (height, width), and return (height, width, C) uint8.

    crop="center" takes the largest centered box with the aspect ratio of `size`. Other crops are the boxes in CELEBA_BOXES,
    scaled to the size of the image.
    """
    width, height = image.size
    if crop in CELEBA_BOXES:
        scale = width / CELEBA_SIZE[0]
        if abs(height - scale * CELEBA_SIZE[1]) > 1:
            raise ValueError(
                f"data.crop={crop} requires CelebA's aligned {CELEBA_SIZE[0]}x{CELEBA_SIZE[1]} images (got {width}x{height})"
            )
        left, top, right, bottom = (int(edge * scale) for edge in CELEBA_BOXES[crop])
    else:
        aspect = size[1] / size[0]
        box_width = min(width, max(1, round(height * aspect)))
        box_height = min(height, max(1, round(width / aspect)))
        left, top = (width - box_width) // 2, (height - box_height) // 2
        right, bottom = left + box_width, top + box_height
    if (bottom - top, right - left) == tuple(size):
        image = image.crop((left, top, right, bottom))
    else:
        # Pillow multiplies RGB by alpha before it resamples RGBA, so hidden colors do not leak into edges.
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    return np.asarray(image).reshape(*size, -1)
