"""Image loading throughput: the pixel cache against torchvision's ImageFolder and DataLoader, on the same JPEG files.

    python benchmarks/loader.py [number of images] [batch size]

The images are synthetic faces, saved as JPEG of 178x218 and cropped to 64x64. Our first pass decodes and caches them, which
ImageFolder does in every epoch. Later passes gather from the cache.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from timing import DEVICE, machine, print_table, wait  # before torch

# isort: split
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dataset import TRAIN, synthetic_faces
from dataset.image_cache import load_images
from dataset.loader import BatchLoader, Shuffle
from utils.images import to_float
from utils.settings import load_config

BASELINE = "ImageFolder + DataLoader, every epoch"
EPOCHS = 4  # per measurement of our loader


def write_images(folder: Path, num_images: int) -> None:
    (folder / "faces").mkdir(parents=True)
    for start in range(0, num_images, 256):
        indices = np.arange(start, min(start + 256, num_images))
        for i, face in zip(indices, synthetic_faces.render(0, indices, 218)):
            Image.fromarray(face[:, 20:198]).save(folder / "faces" / f"{i:06d}.jpg", quality=92)


def measure_torchvision(folder: Path, batch_size: int) -> float:
    """Return images per second; the first epoch is a warm-up that starts the workers and the device."""
    transform = v2.Compose(
        [v2.CenterCrop(178), v2.Resize(64, antialias=True), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    )
    loader = DataLoader(
        ImageFolder(folder, transform),
        batch_size,
        shuffle=True,
        num_workers=os.cpu_count(),
        drop_last=True,
        persistent_workers=True,
    )
    for _ in ("warm-up", "measurement"):
        started = time.perf_counter()
        images_seen = sum(len(x.to(DEVICE)) for x, _ in loader)
        wait()
        seconds = time.perf_counter() - started
    return images_seen / seconds


def measure_ours(folder: Path, runs_dir: Path, batch_size: int) -> tuple[float, float]:
    """Return images per second of the first pass, and of later epochs after a warm-up."""
    config = load_config(None, [f"runs_dir={runs_dir}", "data.source=folder", f"data.path={folder}", "data.image_size=64"])
    started = time.perf_counter()
    images = load_images(config)
    first_pass = len(images.pixels) / (time.perf_counter() - started)
    rows = torch.from_numpy(images.rows(TRAIN))
    pixels, order = BatchLoader([torch.from_numpy(images.pixels)], DEVICE), Shuffle(len(rows), 0)
    for _ in ("warm-up", "measurement"):
        started = time.perf_counter()
        for start in range(0, EPOCHS * len(rows), batch_size):
            to_float(pixels.batch(rows[order.indices(start, batch_size)]))
        wait()
        seconds = time.perf_counter() - started
    return first_pass, EPOCHS * len(rows) / seconds


def main(num_images: int = 4000, batch_size: int = 64) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        write_images(folder, num_images)
        baseline = measure_torchvision(folder, batch_size)
        first_pass, later = measure_ours(folder, Path(name) / "runs", batch_size)
    rates = {BASELINE: baseline, "ours, first pass (decodes and caches)": first_pass, "ours, every later epoch": later}
    print(f"\n{num_images:,} JPEG images, batch size {batch_size}, {os.cpu_count()} workers, {machine()}\n")
    print_table(
        ["", "images/s", "relative"], [[name, f"{rate:,.0f}", f"{rate / baseline:.1f}"] for name, rate in rates.items()]
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
