"""Pixels for training: sources are decoded once into a uint8 cache; batches are gathers by index."""

import hashlib
import json
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from lab import parallel
from lab.artifacts import require_space
from lab.errors import UserError
from sources import HELD_OUT, TRAIN
from sources.images import SOURCES, Source

MAX_SHOWN = 100
MAX_DAMAGED = 0.01  # share of unreadable images above which the data is taken to be wrong
MIN_IMAGES = 8
BLOCK = 64  # images a worker reads at a time
AHEAD = 2 + (os.cpu_count() or 1)  # blocks that are read or wait to be written
CACHE_VERSION = 3  # of what a cache holds: an older one is made anew


@dataclass
class Images:
    """The uint8 cache of a source: pixels (N, size, size, 3), memory-mapped."""

    pixels: np.ndarray
    split: np.ndarray  # (N,) TRAIN, HELD_OUT or TEST
    labels: np.ndarray | None  # (N, K) int64
    label_names: dict[str, list[str]]
    captions: list[list[str]] | None  # of each image, at least one
    fingerprint: str  # of pixels and split

    def rows(self, split: int, at_most: int | None = None) -> np.ndarray:
        """Indices of the images of a split, all or spread evenly over it (class folders come sorted)."""
        return spread(np.flatnonzero(self.split == split), at_most)


@dataclass
class Found:
    """What there is to read, before any of it is read."""

    source: Source
    split: np.ndarray  # (N,) of all pictures of the source
    chosen: np.ndarray  # indices of those that are used
    size: int
    folder: Path  # of the cache

    def count(self, split: int) -> int:
        return int((self.split[self.chosen] == split).sum())

    def load(self) -> Images:
        """From the cache, made first if need be. Raises UserError for images that cannot be used."""
        if parallel.leads() and not (self.folder / "meta.json").is_file():
            build_cache(self)
        parallel.wait()
        return open_cache(self.folder)


def find_images(config: Config) -> Found:
    """Look for the images of config.data. Raises UserError if there are none, or too few to split."""
    data = config.data
    if data.download and not parallel.leads():
        parallel.wait()  # one process downloads
    source = SOURCES[data.source](data, config.seed)
    if data.download and parallel.leads():
        parallel.wait()
    split = source.split
    if split is None or not (split == HELD_OUT).any():
        by_name = split_by_name(source.names, data.holdout)
        split = by_name if split is None else np.where(split == TRAIN, by_name, split)
    key = json.dumps([data.source, data.image_size, data.crop, data.limit, data.holdout, source.key, CACHE_VERSION])
    folder = (
        Path(config.runs_dir) / "cache" / f"{data.source}{data.image_size}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    )
    found = Found(source, split, choose(split, data.limit), data.image_size, folder)
    if not folder.exists():
        require_space(folder, int(1.1 * len(found.chosen) * data.image_size**2 * 3))
    if found.count(TRAIN) < MIN_IMAGES or found.count(HELD_OUT) < 1:
        raise UserError(
            f"data: {len(source.names)} images ({found.count(TRAIN)} for training, {found.count(HELD_OUT)} held out) are too few: "
            f"at least {MIN_IMAGES} for training and 1 held out are needed"
        )
    return found


def load_images(config: Config) -> Images:
    return find_images(config).load()


def split_by_name(names: list[str], share: float) -> np.ndarray:
    """Hold out the images whose names hash lowest: the same ones whatever the order, nearly the same when images are added."""
    order = sorted(range(len(names)), key=lambda i: hashlib.sha1(names[i].encode()).digest())
    split = np.full(len(names), TRAIN, dtype=np.uint8)
    split[order[: max(1, round(share * len(names)))]] = HELD_OUT
    return split


def spread(items, at_most: int | None):
    """All of an array or tensor, or `at_most` of its items at even distances."""
    if at_most is None or at_most >= len(items):
        return items
    return items[np.linspace(0, len(items) - 1, at_most).round().astype(int)]


def choose(split: np.ndarray, limit: int | None) -> np.ndarray:
    """Indices to read: all, or `limit` training images spread evenly (class folders come sorted) and everything else."""
    train = spread(np.flatnonzero(split == TRAIN), limit)
    return np.sort(np.concatenate([train, np.flatnonzero(split != TRAIN)]))


def build_cache(found: Found) -> None:
    """Decode every chosen image, in parallel and in order, into folder/pixels.u8; damaged ones are left out and reported."""
    source, split, chosen, size, folder = found.source, found.split, found.chosen, found.size, found.folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    blocks = [chosen[i : i + BLOCK].tolist() for i in range(0, len(chosen), BLOCK)]
    good, damaged, digest = [], [], hashlib.sha256()
    try:
        with (
            open(temporary / "pixels.u8", "wb") as file,
            ThreadPoolExecutor(os.cpu_count()) as pool,
            tqdm(total=len(chosen), desc="reading images", unit="img") as bar,
        ):
            # Pillow decodes outside the interpreter lock. A few blocks ahead: all of them might not fit the memory.
            ahead = deque(pool.submit(source.read, block) for block in blocks[:AHEAD])
            for n, block in enumerate(blocks):
                pictures = ahead.popleft().result()
                if n + AHEAD < len(blocks):
                    ahead.append(pool.submit(source.read, blocks[n + AHEAD]))
                for i, picture in zip(block, pictures):
                    if isinstance(picture, str):
                        damaged.append(f"{source.names[i]}: {picture}")
                        if len(damaged) > max(MAX_SHOWN, MAX_DAMAGED * len(chosen)):
                            pool.shutdown(wait=False, cancel_futures=True)
                            report_damaged(folder, damaged, len(chosen))  # enough to know: a wrong crop damages all
                        continue
                    good.append(i)
                    file.write(picture.tobytes())
                    digest.update(picture.tobytes())
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
        report_damaged(folder, damaged, len(chosen))
        labels = np.zeros((len(good), 0), dtype=np.int64) if source.labels is None else source.labels[good]
        np.save(temporary / "split.npy", split[good])
        np.save(temporary / "labels.npy", labels)
        digest.update(split[good].tobytes())  # not labels: other ones make no other VAE
        meta = dict(
            count=len(good),
            size=size,
            label_names=source.label_names,
            names=[source.names[i] for i in good],
            captions=[source.captions[i] for i in good] if source.captions is not None else None,
            damaged=damaged,
            fingerprint=digest.hexdigest()[:16],
        )
        (temporary / "meta.json").write_text(json.dumps(meta))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def report_damaged(folder: Path, damaged: list[str], total: int) -> None:
    if not damaged:
        return
    report = folder.with_name(folder.name + "-damaged.txt")
    report.write_text("\n".join(damaged) + "\n")
    line = f"{len(damaged)} of {total} images cannot be read and are skipped, named in {report}; the first: {damaged[0]}"
    if len(damaged) > MAX_DAMAGED * total:
        raise UserError(f"data: {line} (more than {MAX_DAMAGED:.0%} is an error)")
    print(line)


def open_cache(folder: Path) -> Images:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        shape = (meta["count"], meta["size"], meta["size"], 3)
        # mode c: a private view, so that torch may wrap it without a warning about read-only memory
        pixels = np.memmap(folder / "pixels.u8", dtype=np.uint8, mode="c", shape=shape)
        split, labels = np.load(folder / "split.npy"), np.load(folder / "labels.npy")
    except (OSError, ValueError, KeyError):
        raise UserError(f"the image cache {folder} is damaged: remove it and run the same command again") from None
    return Images(
        pixels, split, labels if labels.shape[1] else None, meta["label_names"], meta["captions"], meta["fingerprint"]
    )


# Batches


def to_float(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], channels_last in memory."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> np.ndarray:
    """Float (B, 3, H, W) -> uint8 (B, H, W, 3); values outside [-1, 1] are clipped."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


class Shuffle:
    """An endless stream of shuffled epochs over n items. Position i is a pure function of (seed, i): nothing to save."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self._epochs: dict[int, Tensor] = {}

    def take(self, start: int, count: int) -> Tensor:
        """Items at positions start … start+count-1, (count,) int64."""
        positions = torch.arange(start, start + count)
        first, last = start // self.n, (start + count - 1) // self.n
        self._epochs = {e: self._epochs[e] if e in self._epochs else self._permutation(e) for e in range(first, last + 1)}
        items = self._epochs[first] if first == last else torch.cat([self._epochs[e] for e in range(first, last + 1)])
        return items[positions - first * self.n]

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
