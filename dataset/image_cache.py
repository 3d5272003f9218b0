"""Pixel cache: images are decoded once into a memory-mapped uint8 array."""

import hashlib
import io
import json
import math
import os
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import numpy as np
from tqdm import tqdm

from config import Config
from dataset import TEST, TRAIN, VAL, evenly_spaced
from dataset.sources import SOURCES, Source
from utils import distributed
from utils.checksums import checksum, in_background
from utils.errors import UserError
from utils.files import first_line, make_dir, remove_leftovers, require_space, write_atomically
from utils.locks import locked

MIN_TRAIN_IMAGES = 8
MAX_DAMAGED_FRACTION = 0.01  # of unreadable images
ABORT_AFTER_DAMAGED = 100  # unreadable images
BLOCK_SIZE = 64  # images per read task and per checksum
PREFETCH_BLOCKS = 2 + (os.cpu_count() or 1)
CACHE_VERSION = 7  # increase when the format changes
CHECKSUMS = "checksums.json"  # written last
TABLES = ("split.npy", "labels.npy", "meta.json")


@dataclass
class Images:
    """A decoded dataset; `pixels` is memory-mapped."""

    pixels: np.ndarray  # (N, height, width, C) uint8
    split: np.ndarray  # (N,) TRAIN, VAL or TEST
    labels: np.ndarray | None  # (N, K) int64
    label_names: dict[str, list[str]]
    captions: list[list[str]] | None  # at least one per image
    fingerprint: str  # of pixels and split
    verified: Future  # result() waits until the pixels are verified; wait for it before keeping anything computed from them

    def rows(self, split: int, at_most: int | None = None) -> np.ndarray:
        """Return the indices of a split's images; evenly spaced ones, as files may be sorted by class."""
        return evenly_spaced(np.flatnonzero(self.split == split), at_most)


@dataclass
class DatasetIndex:
    """The images of a dataset and their split, before any is decoded."""

    source: Source
    split: np.ndarray  # (N,) of all images of the source
    selected: np.ndarray  # indices of the images to use
    image_shape: tuple[int, int, int]  # (height, width, C)
    cache_dir: Path

    def num_images(self, split: int) -> int:
        return int((self.split[self.selected] == split).sum())

    @property
    def image_bytes(self) -> int:
        return math.prod(self.image_shape)

    def describe(self) -> list[str]:
        """Lines of the plan: all files that were found, the splits, labels and captions."""
        source, num_unused = self.source, len(self.split) - len(self.selected)
        unused = f"; {num_unused:,} images not used (data.max_train_images)" if num_unused else ""
        test = f", {self.num_images(TEST):,} for testing" if self.num_images(TEST) else ""
        lines = [f"dataset: {source.account}{unused}"] if source.account else []
        lines.append(f"images: {self.num_images(TRAIN):,} for training, {self.num_images(VAL):,} for validation{test}")
        if source.label_names:
            names = [f"{name} ({len(values)})" for name, values in source.label_names.items()]
            lines.append(f"labels: {', '.join(names[:5])}" + (f" and {len(names) - 5} others" if len(names) > 5 else ""))
        if source.captions is not None:
            lines.append(f"captions: {sum(map(len, source.captions)):,}")
        return lines

    def load(self) -> Images:
        """Open the cache; rank 0 builds it first if it does not exist."""
        distributed.require_same(
            self.cache_dir.name, "data: the image cache", "all processes need the same files and the same data.path"
        )
        distributed.require_shared(self.cache_dir.parent)
        if distributed.is_main() and not (self.cache_dir / CHECKSUMS).exists():
            build_cache(self)
        distributed.barrier()
        return open_cache(self.cache_dir)


def index_dataset(config: Config) -> DatasetIndex:
    """List and split the images of config.data."""
    cfg = config.data
    downloads = cfg.download or cfg.source == "huggingface"
    if downloads and not distributed.is_main():
        distributed.barrier()  # rank 0 downloads first
    source = SOURCES[cfg.source](cfg, config.seed)
    if downloads and distributed.is_main():
        distributed.barrier()
    split = source.split
    if split is None or not (split == VAL).any():
        split_by_hash = split_by_name(source.names, cfg.val_fraction)
        split = split_by_hash if split is None else np.where(split == TRAIN, split_by_hash, split)
    image_shape = (*cfg.size, cfg.channels)
    key = json.dumps(
        [
            cfg.source,
            image_shape,
            cfg.crop,
            cfg.max_train_images,
            cfg.val_fraction,
            source.cache_key,
            BLOCK_SIZE,
            CACHE_VERSION,
        ]
    )
    path = os.path.abspath(cfg.path) if cfg.path else cfg.source
    digests = (hashlib.sha256(text.encode()).hexdigest() for text in (path, key))
    cache_name = f"{cfg.source}{cfg.size_text}-{next(digests)[:8]}-{next(digests)[:12]}"
    index = DatasetIndex(
        source=source,
        split=split,
        selected=select_images(split, cfg.max_train_images),
        image_shape=image_shape,
        cache_dir=Path(config.runs_dir) / "cache" / cache_name,
    )
    if not index.cache_dir.exists():
        partial = partial_dir(index.cache_dir) / "pixels.u8"
        num_bytes = int(1.1 * len(index.selected) * index.image_bytes)
        require_space(index.cache_dir, num_bytes - (partial.stat().st_size if partial.exists() else 0))
    if index.num_images(TRAIN) < MIN_TRAIN_IMAGES or index.num_images(VAL) < 1:
        raise UserError(
            f"data: too few images: at least {MIN_TRAIN_IMAGES} for training and 1 for validation are needed "
            f"(got {index.num_images(TRAIN)} and {index.num_images(VAL)} of {len(source.names)})"
        )
    return index


def load_images(config: Config) -> Images:
    """Load the images of config.data and wait until they are verified."""
    images = index_dataset(config).load()
    images.verified.result()
    return images


def split_by_name(names: list[str], val_fraction: float) -> np.ndarray:
    """Assign the lowest name hashes to VAL: independent of order and stable when images are added.

    Folders that all images share are left out, so that a zip has the split of the folder in it.
    """
    num_shared = len("".join(f"{part}/" for part in os.path.commonprefix([name.split("/")[:-1] for name in names])))
    order = sorted(range(len(names)), key=lambda i: hashlib.sha1(names[i][num_shared:].encode()).digest())
    split = np.full(len(names), TRAIN, dtype=np.uint8)
    split[order[: max(1, round(val_fraction * len(names)))]] = VAL
    return split


def select_images(split: np.ndarray, max_train_images: int | None) -> np.ndarray:
    """Return sorted indices of all val and test images and evenly spaced training images."""
    train = evenly_spaced(np.flatnonzero(split == TRAIN), max_train_images)
    return np.sort(np.concatenate([train, np.flatnonzero(split != TRAIN)]))


def build_cache(index: DatasetIndex) -> None:
    """Decode the selected images into cache_dir; skip and report damaged ones. Continues an interrupted build."""
    cache_dir, partial = index.cache_dir, partial_dir(index.cache_dir)
    lock = cache_dir.with_name(f".{cache_dir.name}.lock")
    with locked(lock, f"waiting for another process that reads the images into {cache_dir}"):
        if (cache_dir / CHECKSUMS).exists():
            return
        make_dir(partial)
        note_other_caches(cache_dir)
        try:
            write_tables(index, partial, decode_blocks(index, partial))
        except UserError:  # too many damaged images
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if cache_dir.is_file():
            raise UserError(f"{cache_dir} is a file in the place of the image cache: remove it")
        remove_leftovers(partial)
        shutil.rmtree(cache_dir, ignore_errors=True)
        os.replace(partial, cache_dir)


def partial_dir(cache_dir: Path) -> Path:
    """Folder of a cache that is being built. The journal describes the blocks that its pixel file holds so far."""
    return cache_dir.with_name(f".{cache_dir.name}.partial")


def note_other_caches(cache_dir: Path) -> None:
    """Print the caches of the same source and data.path, which have other settings or were read before a file changed."""
    same_path = cache_dir.name.rpartition("-")[0].rpartition("-")[2]
    for other in sorted(cache_dir.parent.iterdir()):
        if other.is_dir() and f"-{same_path}-" in other.name and other not in (cache_dir, partial_dir(cache_dir)):
            num_bytes = sum(file.stat().st_size for file in other.iterdir())
            print(
                f"note: {other} ({num_bytes / 1e6:,.0f} MB) holds images of the same source with other settings or older files; "
                f"if you do not need it: rm -r {other}"
            )


@dataclass
class Block:
    """An entry of the journal: the result of a read task."""

    num_images: int  # readable ones
    damaged: list[tuple[int, str]]  # index in the source, error message
    checksum: str  # of the pixels

    def line(self) -> str:
        """A line of the journal: the checksum of the JSON, then the JSON."""
        text = json.dumps(vars(self))
        return f"{checksum(text.encode())} {text}\n"

    @classmethod
    def parse(cls, line: bytes) -> "Block | None":
        """None for a damaged line."""
        stored, _, text = line.partition(b" ")
        return cls(**json.loads(text)) if stored == checksum(text).encode() else None


def decode_blocks(index: DatasetIndex, folder: Path) -> list[Block]:
    """Write folder/pixels.u8 and its journal, block by block and in order, after the blocks that are there already."""
    source, selected = index.source, index.selected
    indices = [selected[start : start + BLOCK_SIZE].tolist() for start in range(0, len(selected), BLOCK_SIZE)]
    blocks = read_journal(folder, index.image_bytes)
    todo = indices[len(blocks) :]
    if blocks:
        print(f"continuing the image cache after {sum(map(len, indices[: len(blocks)])):,} of {len(selected):,} images")
    damaged = [entry for block in blocks for entry in block.damaged]
    with (
        open(folder / "pixels.u8", "ab") as file,
        open(folder / "journal", "a") as journal,
        ThreadPoolExecutor(os.cpu_count()) as pool,  # Pillow decodes without holding the GIL
        tqdm(total=len(selected), initial=len(selected) - sum(map(len, todo)), desc="reading images", unit="img") as bar,
    ):
        for block_indices, images in zip(todo, _read_in_order(source, todo, pool)):
            errors = [(i, image) for i, image in zip(block_indices, images) if isinstance(image, str)]
            content = b"".join(image.tobytes() for image in images if not isinstance(image, str))
            block = Block(len(images) - len(errors), errors, checksum(content))
            for target, data in ((file, content), (journal, block.line())):
                target.write(data)
                target.flush()
            blocks.append(block)
            damaged += errors
            if len(damaged) > max(ABORT_AFTER_DAMAGED, MAX_DAMAGED_FRACTION * len(selected)):
                pool.shutdown(wait=False, cancel_futures=True)
                break
            bar.update(len(images))
        os.fsync(file.fileno())
    report_damaged(index.cache_dir, [f"{source.names[i]}: {error}" for i, error in damaged], len(selected))
    return blocks


def _read_in_order(source: Source, blocks: list[list[int]], pool: ThreadPoolExecutor) -> Iterator[list[np.ndarray | str]]:
    """Yield the images or error messages of each block, reading PREFETCH_BLOCKS ahead to bound memory."""
    pending = deque(pool.submit(source.read, block) for block in blocks[:PREFETCH_BLOCKS])
    for n in range(len(blocks)):
        images = pending.popleft().result()
        if n + PREFETCH_BLOCKS < len(blocks):
            pending.append(pool.submit(source.read, blocks[n + PREFETCH_BLOCKS]))
        yield images


def read_journal(folder: Path, image_bytes: int) -> list[Block]:
    """Return the blocks of an interrupted build, up to the first that pixels.u8 does not hold intact; cut both files there."""
    blocks: list[Block] = []
    pixels, journal = folder / "pixels.u8", folder / "journal"
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


def write_tables(index: DatasetIndex, folder: Path, blocks: list[Block]) -> None:
    """Write split, labels and metadata of the readable images, and the checksums of all files."""
    source, damaged = index.source, {i for block in blocks for i, _ in block.damaged}
    good = [i for i in index.selected.tolist() if i not in damaged]
    split, labels = index.split[good], np.zeros((len(good), 0), dtype=np.int64)
    checksums = {"pixels.u8": [(block.num_images, block.checksum) for block in blocks]}
    meta = dict(
        count=len(good),
        image_shape=index.image_shape,
        label_names=source.label_names,
        names=[source.names[i] for i in good],
        captions=[source.captions[i] for i in good] if source.captions is not None else None,
        # Labels are left out: the VAE does not depend on them.
        fingerprint=hashlib.sha256(json.dumps(checksums).encode() + split.tobytes()).hexdigest()[:16],
    )
    labels = labels if source.labels is None else source.labels[good]
    for name, content in zip(TABLES, (_npy(split), _npy(labels), json.dumps(meta).encode())):
        checksums[name] = checksum(content)
        write_atomically(folder / name, lambda temporary: temporary.write_bytes(content))
    write_atomically(folder / CHECKSUMS, lambda temporary: temporary.write_text(json.dumps(checksums)))
    (folder / "journal").unlink()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def report_damaged(cache_dir: Path, damaged: list[str], total: int) -> None:
    """List unreadable images in a file next to the cache; too many are an error."""
    if not damaged:
        return
    report = cache_dir.with_name(cache_dir.name + "-damaged.txt")
    report.write_text("\n".join(damaged) + "\n")
    message = f"{len(damaged)} of {total} images cannot be read and are skipped (listed in {report}); first: {damaged[0]}"
    if len(damaged) > MAX_DAMAGED_FRACTION * total:
        raise UserError(f"data: {message} (more than {MAX_DAMAGED_FRACTION:.0%} is an error)")
    print(message)


def open_cache(cache_dir: Path) -> Images:
    """Open a cache and verify it: the pixels in the background, everything else at once."""
    try:
        checksums = json.loads((cache_dir / CHECKSUMS).read_bytes())
        split, labels, meta = (_read_verified(cache_dir / name, checksums[name]) for name in TABLES)
        split, labels, meta = np.load(io.BytesIO(split)), np.load(io.BytesIO(labels)), json.loads(meta)
        shape = (meta["count"], *meta["image_shape"])
        path, blocks = cache_dir / "pixels.u8", [Block(n, [], digest) for n, digest in checksums["pixels.u8"]]
        if path.stat().st_size != math.prod(shape) or sum(block.num_images for block in blocks) != meta["count"]:
            raise ValueError("pixels.u8 has the wrong size")
        # Mode "c" (copy on write): torch warns when it wraps read-only memory.
        pixels = np.memmap(path, dtype=np.uint8, mode="c", shape=shape)
    except Exception as error:  # any content is possible: many error types
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
    """Compare every block with its checksum."""
    first = 0
    try:
        with open(cache_dir / "pixels.u8", "rb") as file:
            for block in blocks:
                if checksum(file.read(block.num_images * image_bytes)) != block.checksum:
                    raise ValueError(f"the checksum of images {first} to {first + block.num_images - 1} does not match")
                first += block.num_images
    except Exception as error:  # read errors of the disk; wrong types in checksums.json
        raise _damaged(cache_dir, error) from None
