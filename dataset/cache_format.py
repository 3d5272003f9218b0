"""On-disk format of the image cache: pixels.u8, tables, checksums, and the journal of an unfinished build.

A cache is built in partial_dir() and renamed when it is complete. Until then, each line of the journal describes one block of
images in pixels.u8, so that an interrupted build can continue. At the end, write_tables() replaces the journal by
checksums.json, which holds a checksum per block and per table. open_cache() verifies them.
"""

import hashlib
import io
import json
import math
import shutil
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset import evenly_spaced
from utils.checksums import checksum, in_background
from utils.errors import UserError
from utils.files import first_line, make_dir, write_atomically

CACHE_VERSION = 8  # increase when the format, or the rules for labels, captions or splits, change
PIXELS = "pixels.u8"
JOURNAL = "journal"
TABLES = ("split.npy", "labels.npy", "meta.json")
CHECKSUMS = "checksums.json"  # written last: a cache without it is incomplete


@dataclass
class Images:
    """A dataset of N decoded images."""

    pixels: np.ndarray  # (N, height, width, C) uint8, memory-mapped
    split: np.ndarray  # (N,) TRAIN, VAL or TEST
    labels: np.ndarray | None  # (N, K) int64
    label_names: dict[str, list[str]]
    captions: list[list[str]] | None  # at least one per image
    fingerprint: str  # of pixels and split
    # Background check of the pixels' checksums. Call result() before saving any results: it waits for the end of the check,
    # and raises UserError if the pixels are damaged.
    verified: Future

    def rows(self, split: int, at_most: int | None = None) -> np.ndarray:
        """Return the indices of the images of a split, or `at_most` evenly spaced ones: files may be sorted by class."""
        return evenly_spaced(np.flatnonzero(self.split == split), at_most)


def partial_dir(cache_dir: Path) -> Path:
    """Return the folder in which a cache is built. It holds pixels.u8 and a journal with one line per finished block."""
    return cache_dir.with_name(f".{cache_dir.name}.partial")


@dataclass
class Block:
    """Consecutive images that were decoded together. The journal has one line per block."""

    num_images: int  # number of readable images, which pixels.u8 holds
    damaged: list[tuple[int, str]]  # unreadable images: (index in the source, error message)
    checksum: str  # of the pixels of the readable images

    def line(self) -> str:
        """Return this block as a line of the journal: the checksum of the JSON text, a space, and the JSON text."""
        text = json.dumps(vars(self))
        return f"{checksum(text.encode())} {text}\n"

    @classmethod
    def parse(cls, line: bytes) -> "Block | None":
        """Parse a line of the journal; return None if it is damaged."""
        stored, _, text = line.partition(b" ")
        return cls(**json.loads(text)) if stored == checksum(text).encode() else None


def read_journal(folder: Path, image_bytes: int) -> list[Block]:
    """Return the intact blocks of an interrupted build. Truncate pixels.u8 and the journal to these blocks."""
    blocks: list[Block] = []
    pixels, journal = folder / PIXELS, folder / JOURNAL
    if not (pixels.is_file() and journal.is_file()):
        shutil.rmtree(folder)
        make_dir(folder)
        return blocks
    with open(pixels, "rb+") as file:
        for line in journal.read_bytes().splitlines():
            block = Block.parse(line)
            if block is None or checksum(file.read(block.num_images * image_bytes)) != block.checksum:
                break
            blocks.append(block)
        file.truncate(sum(block.num_images for block in blocks) * image_bytes)
    journal.write_text("".join(block.line() for block in blocks))
    return blocks


def write_tables(folder: Path, blocks: list[Block], split: np.ndarray, labels: np.ndarray, meta: dict) -> None:
    """Write the split (N,), labels (N, K) and other metadata of the readable images, and the checksums of all files."""
    checksums = {PIXELS: [(block.num_images, block.checksum) for block in blocks]}
    # The fingerprint does not cover the labels, because the VAE does not depend on them.
    fingerprint = hashlib.sha256(json.dumps(checksums).encode() + split.tobytes()).hexdigest()[:16]
    meta = {**meta, "fingerprint": fingerprint}
    for name, content in zip(TABLES, (_npy(split), _npy(labels), json.dumps(meta).encode())):
        checksums[name] = checksum(content)
        write_atomically(folder / name, lambda temporary: temporary.write_bytes(content))
    write_atomically(folder / CHECKSUMS, lambda temporary: temporary.write_text(json.dumps(checksums)))
    (folder / JOURNAL).unlink()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def open_cache(cache_dir: Path) -> Images:
    """Open a cache. Verify the pixels in the background (see Images.verified), and all other files before returning."""
    try:
        checksums = json.loads((cache_dir / CHECKSUMS).read_bytes())
        split, labels, meta = (_read_verified(cache_dir / name, checksums[name]) for name in TABLES)
        split, labels, meta = np.load(io.BytesIO(split)), np.load(io.BytesIO(labels)), json.loads(meta)
        shape = (meta["count"], *meta["image_shape"])
        path, blocks = cache_dir / PIXELS, [Block(n, [], digest) for n, digest in checksums[PIXELS]]
        if path.stat().st_size != math.prod(shape) or sum(block.num_images for block in blocks) != meta["count"]:
            raise ValueError(f"{PIXELS} has the wrong size")
        # Copy on write (mode "c") instead of read-only, because torch warns about read-only arrays.
        pixels = np.memmap(path, dtype=np.uint8, mode="c", shape=shape)
    except Exception as error:  # damaged files cause many exception types
        raise _damaged(cache_dir, error) from None
    return Images(
        pixels=pixels,
        split=split,
        labels=labels if labels.shape[1] else None,
        label_names=meta["label_names"],
        captions=meta["captions"],
        fingerprint=meta["fingerprint"],
        verified=in_background(lambda: verify_pixels(cache_dir, blocks, math.prod(shape[1:]))),
    )


def _damaged(cache_dir: Path, error: Exception) -> UserError:
    return UserError(
        f"the image cache {cache_dir} is damaged ({first_line(error)}): remove it and run the same command again"
    )


def _read_verified(path: Path, expected: str) -> bytes:
    content = path.read_bytes()
    if checksum(content) != expected:
        raise ValueError(f"the checksum of {path.name} does not match")
    return content


def verify_pixels(cache_dir: Path, blocks: list[Block], image_bytes: int) -> None:
    """Compare the pixels of every block with its checksum. Raise UserError if one differs."""
    first = 0
    try:
        with open(cache_dir / PIXELS, "rb") as file:
            for block in blocks:
                if checksum(file.read(block.num_images * image_bytes)) != block.checksum:
                    raise ValueError(f"the checksum of images {first} to {first + block.num_images - 1} does not match")
                first += block.num_images
    except Exception as error:  # a read error of the disk, or wrong types in checksums.json
        raise _damaged(cache_dir, error) from None
