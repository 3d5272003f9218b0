"""Pixel cache: images are decoded once into a memory-mapped uint8 array."""

import hashlib
import json
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import numpy as np
from tqdm import tqdm

from config import Config
from dataset import TEST, TRAIN, VAL, evenly_spaced
from dataset.sources import SOURCES, Source
from utils import distributed
from utils.errors import UserError
from utils.files import require_space

MIN_TRAIN_IMAGES = 8
MAX_DAMAGED_FRACTION = 0.01  # of unreadable images
ABORT_AFTER_DAMAGED = 100  # unreadable images
BLOCK_SIZE = 64  # images per read task
PREFETCH_BLOCKS = 2 + (os.cpu_count() or 1)
CACHE_VERSION = 5  # increase when the format changes


@dataclass
class Images:
    """A decoded dataset; `pixels` is memory-mapped."""

    pixels: np.ndarray  # (N, size, size, 3) uint8
    split: np.ndarray  # (N,) TRAIN, VAL or TEST
    labels: np.ndarray | None  # (N, K) int64
    label_names: dict[str, list[str]]
    captions: list[list[str]] | None  # at least one per image
    fingerprint: str  # of pixels and split

    def rows(self, split: int, at_most: int | None = None) -> np.ndarray:
        """Return the indices of a split's images; evenly spaced ones, as files may be sorted by class."""
        return evenly_spaced(np.flatnonzero(self.split == split), at_most)


@dataclass
class DatasetIndex:
    """The images of a dataset and their split, before any is decoded."""

    source: Source
    split: np.ndarray  # (N,) of all images of the source
    selected: np.ndarray  # indices of the images to use
    image_size: int
    cache_dir: Path

    def num_images(self, split: int) -> int:
        return int((self.split[self.selected] == split).sum())

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
        if distributed.is_main() and not (self.cache_dir / "meta.json").is_file():
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
    key = json.dumps(
        [cfg.source, cfg.image_size, cfg.crop, cfg.max_train_images, cfg.val_fraction, source.cache_key, CACHE_VERSION]
    )
    cache_name = f"{cfg.source}{cfg.image_size}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    index = DatasetIndex(
        source=source,
        split=split,
        selected=select_images(split, cfg.max_train_images),
        image_size=cfg.image_size,
        cache_dir=Path(config.runs_dir) / "cache" / cache_name,
    )
    if not index.cache_dir.exists():
        require_space(index.cache_dir, int(1.1 * len(index.selected) * cfg.image_size**2 * 3))
    if index.num_images(TRAIN) < MIN_TRAIN_IMAGES or index.num_images(VAL) < 1:
        raise UserError(
            f"data: too few images: at least {MIN_TRAIN_IMAGES} for training and 1 for validation are needed "
            f"(got {index.num_images(TRAIN)} and {index.num_images(VAL)} of {len(source.names)})"
        )
    return index


def load_images(config: Config) -> Images:
    return index_dataset(config).load()


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
    """Decode the selected images in order into cache_dir/pixels.u8; skip and report damaged ones."""
    source, split, selected, cache_dir = index.source, index.split, index.selected, index.cache_dir
    temporary = cache_dir.with_name(f".{cache_dir.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    good, damaged, digest = [], [], hashlib.sha256()
    try:
        with (
            open(temporary / "pixels.u8", "wb") as file,
            ThreadPoolExecutor(os.cpu_count()) as pool,  # Pillow decodes without holding the GIL
            tqdm(total=len(selected), desc="reading images", unit="img") as bar,
        ):
            for i, image in _read_in_order(source, selected, pool):
                if isinstance(image, str):
                    damaged.append(f"{source.names[i]}: {image}")
                    if len(damaged) > max(ABORT_AFTER_DAMAGED, MAX_DAMAGED_FRACTION * len(selected)):
                        pool.shutdown(wait=False, cancel_futures=True)
                        report_damaged(cache_dir, damaged, len(selected))  # raises
                else:
                    good.append(i)
                    file.write(image.tobytes())
                    digest.update(image.tobytes())
                bar.update()
            file.flush()
            os.fsync(file.fileno())
        report_damaged(cache_dir, damaged, len(selected))
        labels = np.zeros((len(good), 0), dtype=np.int64) if source.labels is None else source.labels[good]
        np.save(temporary / "split.npy", split[good])
        np.save(temporary / "labels.npy", labels)
        digest.update(split[good].tobytes())  # labels are left out: the VAE does not depend on them
        meta = dict(
            count=len(good),
            size=index.image_size,
            label_names=source.label_names,
            names=[source.names[i] for i in good],
            captions=[source.captions[i] for i in good] if source.captions is not None else None,
            damaged=damaged,
            fingerprint=digest.hexdigest()[:16],
        )
        (temporary / "meta.json").write_text(json.dumps(meta))
        shutil.rmtree(cache_dir, ignore_errors=True)
        os.replace(temporary, cache_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_in_order(source: Source, indices: np.ndarray, pool: ThreadPoolExecutor) -> Iterator[tuple[int, np.ndarray | str]]:
    """Yield (index, image or error message), reading PREFETCH_BLOCKS blocks ahead to bound memory."""
    blocks = [indices[start : start + BLOCK_SIZE].tolist() for start in range(0, len(indices), BLOCK_SIZE)]
    pending = deque(pool.submit(source.read, block) for block in blocks[:PREFETCH_BLOCKS])
    for n, block in enumerate(blocks):
        images = pending.popleft().result()
        if n + PREFETCH_BLOCKS < len(blocks):
            pending.append(pool.submit(source.read, blocks[n + PREFETCH_BLOCKS]))
        yield from zip(block, images)


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
    try:
        meta = json.loads((cache_dir / "meta.json").read_text())
        shape = (meta["count"], meta["size"], meta["size"], 3)
        # Mode "c" (copy on write): torch warns when it wraps read-only memory.
        pixels = np.memmap(cache_dir / "pixels.u8", dtype=np.uint8, mode="c", shape=shape)
        split, labels = np.load(cache_dir / "split.npy"), np.load(cache_dir / "labels.npy")
    except (OSError, ValueError, KeyError):
        raise UserError(f"the image cache {cache_dir} is damaged: remove it and run the same command again") from None
    return Images(
        pixels=pixels,
        split=split,
        labels=labels if labels.shape[1] else None,
        label_names=meta["label_names"],
        captions=meta["captions"],
        fingerprint=meta["fingerprint"],
    )
