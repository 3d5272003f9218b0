"""Image cache: index a dataset, decode its images once, and open them as a memory-mapped uint8 array.

The files of a cache are read and written by cache_format.py.
"""

import hashlib
import json
import math
import os
import shutil
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import numpy as np
from tqdm import tqdm

from config import Config
from dataset import TEST, TRAIN, VAL, evenly_spaced
from dataset.cache_format import (
    CACHE_VERSION,
    CHECKSUMS,
    JOURNAL,
    PIXELS,
    Block,
    Images,
    open_cache,
    partial_dir,
    read_journal,
    write_tables,
)
from dataset.sources import SOURCES, Source
from utils import distributed
from utils.checksums import checksum
from utils.errors import UserError
from utils.files import listed, make_dir, remove_leftovers, require_space
from utils.locks import locked

MIN_TRAIN_IMAGES = 8
MAX_DAMAGED_FRACTION = 0.01  # a larger fraction of unreadable images is an error
ABORT_AFTER_DAMAGED = 100  # decoding stops early only if more images than this are unreadable
NUM_TEST_READS = 8  # images that are read before the cache is built, to find out whether any can be read
BLOCK_SIZE = 64  # images per block; a block is decoded by one thread and has one checksum
PREFETCH_BLOCKS = 2 + (os.cpu_count() or 1)  # blocks that are decoded ahead of the one being written


@dataclass
class DatasetIndex:
    """Images of a dataset and their split, before any image is decoded."""

    source: Source
    split: np.ndarray  # (N,) split id of every image of the source
    selected: np.ndarray  # indices of the images to use, see select_images()
    image_shape: tuple[int, int, int]  # (height, width, C)
    cache_dir: Path

    def rows(self, split: int) -> np.ndarray:
        """Return the indices of the selected images of a split."""
        return self.selected[self.split[self.selected] == split]

    def num_images(self, split: int) -> int:
        return len(self.rows(split))

    @property
    def image_bytes(self) -> int:
        return math.prod(self.image_shape)

    def describe(self) -> list[str]:
        """Return lines for train_vae.py to print: the numbers of files, of images per split, of labels and of captions."""
        source, num_unused = self.source, len(self.split) - len(self.selected)
        unused = f"; {num_unused:,} images not used (data.max_train_images)" if num_unused else ""
        test = f", {self.num_images(TEST):,} for testing" if self.num_images(TEST) else ""
        lines = [f"dataset: {source.account}{unused}"] if source.account else []
        lines.append(f"images: {self.num_images(TRAIN):,} for training, {self.num_images(VAL):,} for validation{test}")
        used = self.selected[self.split[self.selected] != TEST]
        if source.label_names:
            names = [f"{name} ({len(values)})" for name, values in source.label_names.items()]
            lines.append(f"labels: {listed(names, 5)}")
            num_null = (source.labels[used] == [len(values) for values in source.label_names.values()]).sum(axis=0)
            missing = [f"{n:,} without {name}" for n, name in zip(num_null, source.label_names) if n]
            if missing:
                lines.append(f"images with the null label: {', '.join(missing)}, of {len(used):,}")
            for column, (name, values) in enumerate(source.label_names.items()):
                in_training = np.unique(source.labels[self.rows(TRAIN), column])
                if unseen := [value for i, value in enumerate(values) if i not in in_training]:
                    lines.append(f"values of {name} without training images: {listed(unseen, 5)}")
                counts = Counter(value.casefold() for value in values)
                if same := [value for value in values if counts[value.casefold()] > 1]:
                    lines.append(f"values of {name} that differ only in case: {listed(same, 5)}")
        if source.captions is not None:
            lines.append(f"captions: {sum(len(source.captions[i]) for i in used):,}")
        return lines

    def load(self) -> Images:
        """Open the cache. If it does not exist, rank 0 builds it first."""
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
        distributed.barrier()  # wait until rank 0 has downloaded the dataset
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
    digests = (hashlib.sha256(os.fsencode(text)).hexdigest() for text in (path, key))
    cache_name = f"{cfg.source}{cfg.size_text}-{next(digests)[:8]}-{next(digests)[:12]}"
    index = DatasetIndex(
        source=source,
        split=split,
        selected=select_images(split, cfg.max_train_images),
        image_shape=image_shape,
        cache_dir=Path(config.runs_dir) / "cache" / cache_name,
    )
    if not index.cache_dir.exists():
        partial = partial_dir(index.cache_dir) / PIXELS
        num_bytes = int(1.1 * len(index.selected) * index.image_bytes)
        require_space(index.cache_dir, num_bytes - (partial.stat().st_size if partial.exists() else 0))
        require_readable(index)
    if index.num_images(TRAIN) < MIN_TRAIN_IMAGES or index.num_images(VAL) < 1:
        raise UserError(
            f"data: too few images: at least {MIN_TRAIN_IMAGES} for training and 1 for validation are needed "
            f"(got {index.num_images(TRAIN)} and {index.num_images(VAL)} of {len(source.names)} images)"
        )
    return index


def require_readable(index: DatasetIndex) -> None:
    """Raise UserError if none of a few images can be read, for example because all are Git LFS pointers."""
    sample = evenly_spaced(index.selected, NUM_TEST_READS).tolist()
    images = index.source.read(sample)
    if sample and all(isinstance(image, str) for image in images):
        first = index.source.names[sample[0]]
        raise UserError(
            f"data: none of {len(sample)} images sampled from the dataset can be read, for example {first} ({images[0]}): "
            f"check the files"
        )


def load_images(config: Config) -> Images:
    """Load the images of config.data and wait until their checksums are verified."""
    images = index_dataset(config).load()
    images.verified.result()
    return images


def split_by_name(names: list[str], val_fraction: float) -> np.ndarray:
    """Return split ids (N,): VAL for the images whose names have the lowest hashes, else TRAIN.

    The split does not depend on the order of the names, and hardly changes when images are added. Folders that all images
    share are not hashed, so that a zip with one folder around everything has the same split as the folder itself.
    """
    num_shared = len("".join(f"{part}/" for part in os.path.commonprefix([name.split("/")[:-1] for name in names])))
    order = sorted(range(len(names)), key=lambda i: hashlib.sha1(names[i][num_shared:].encode()).digest())
    split = np.full(len(names), TRAIN, dtype=np.uint8)
    split[order[: max(1, round(val_fraction * len(names)))]] = VAL
    return split


def select_images(split: np.ndarray, max_train_images: int | None) -> np.ndarray:
    """Return the sorted indices of all validation and test images and of max_train_images evenly spaced training images."""
    train = evenly_spaced(np.flatnonzero(split == TRAIN), max_train_images)
    return np.sort(np.concatenate([train, np.flatnonzero(split != TRAIN)]))


def build_cache(index: DatasetIndex) -> None:
    """Decode the selected images into cache_dir, or continue an interrupted build. Damaged images are skipped and listed."""
    cache_dir, partial = index.cache_dir, partial_dir(index.cache_dir)
    lock = cache_dir.with_name(f".{cache_dir.name}.lock")
    with locked(lock, f"waiting for another process that decodes the images into {cache_dir}"):
        if (cache_dir / CHECKSUMS).exists():
            return
        make_dir(partial)
        note_other_caches(cache_dir)
        try:
            blocks = decode_blocks(index, partial)
            write_tables(partial, blocks, *table_contents(index, blocks))
        except UserError:  # too many damaged images
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if cache_dir.is_file():
            raise UserError(f"{cache_dir} is a file, but should be the folder of the image cache: remove it")
        remove_leftovers(partial)
        shutil.rmtree(cache_dir, ignore_errors=True)
        os.replace(partial, cache_dir)


def note_other_caches(cache_dir: Path) -> None:
    """Print the other caches of this source and data.path, which come from other settings or from older files."""
    same_path = cache_dir.name.rpartition("-")[0].rpartition("-")[2]
    for other in sorted(cache_dir.parent.iterdir()):
        # A partial cache, whose name starts with a dot, may belong to a run that is building it.
        if other.is_dir() and f"-{same_path}-" in other.name and other != cache_dir and not other.name.startswith("."):
            num_bytes = sum(file.stat().st_size for file in other.iterdir())
            print(
                f"note: {other} ({num_bytes / 1e6:,.0f} MB) is a cache of this data.path with other settings or older files; "
                f"if you do not need it: rm -r {other}"
            )


def decode_blocks(index: DatasetIndex, folder: Path) -> list[Block]:
    """Decode all blocks into folder/pixels.u8 and its journal, in order. Blocks of an interrupted build are not repeated."""
    source, selected = index.source, index.selected
    indices = [selected[start : start + BLOCK_SIZE].tolist() for start in range(0, len(selected), BLOCK_SIZE)]
    blocks = read_journal(folder, index.image_bytes)
    todo = indices[len(blocks) :]
    if blocks:
        print(f"continuing the image cache after {sum(map(len, indices[: len(blocks)])):,} of {len(selected):,} images")
    damaged = [entry for block in blocks for entry in block.damaged]
    with (
        open(folder / PIXELS, "ab") as file,
        open(folder / JOURNAL, "a") as journal,
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
    """Yield the images (or error messages) of each block. At most PREFETCH_BLOCKS are decoded ahead, to limit memory."""
    pending = deque(pool.submit(source.read, block) for block in blocks[:PREFETCH_BLOCKS])
    for n in range(len(blocks)):
        images = pending.popleft().result()
        if n + PREFETCH_BLOCKS < len(blocks):
            pending.append(pool.submit(source.read, blocks[n + PREFETCH_BLOCKS]))
        yield images


def table_contents(index: DatasetIndex, blocks: list[Block]) -> tuple[np.ndarray, np.ndarray, dict]:
    """Return the split (N,), labels (N, K) and other metadata of the readable images, for write_tables().

    Raises UserError if no validation image is readable.
    """
    source, damaged = index.source, {i for block in blocks for i, _ in block.damaged}
    good = [i for i in index.selected.tolist() if i not in damaged]
    if not (index.split[good] == VAL).any():
        raise UserError("data: none of the validation images can be read")
    labels = np.zeros((len(good), 0), dtype=np.int64) if source.labels is None else source.labels[good]
    meta = dict(
        count=len(good),
        image_shape=index.image_shape,
        label_names=source.label_names,
        names=[source.names[i] for i in good],
        captions=[source.captions[i] for i in good] if source.captions is not None else None,
    )
    return index.split[good], labels, meta


def report_damaged(cache_dir: Path, damaged: list[str], total: int) -> None:
    """List the unreadable images in a file next to the cache. Raise UserError if there are too many."""
    if not damaged:
        return
    report = cache_dir.with_name(cache_dir.name + "-damaged.txt")
    report.write_text("\n".join(damaged) + "\n")
    message = f"{len(damaged)} of {total} images cannot be read and are skipped; {report} lists them; first: {damaged[0]}"
    if len(damaged) > MAX_DAMAGED_FRACTION * total:
        raise UserError(f"data: {message} (more than {MAX_DAMAGED_FRACTION:.0%} is an error)")
    print(message)
