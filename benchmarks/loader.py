"""How fast do pictures come? Our uint8 cache against torchvision's ImageFolder and DataLoader, on the same JPEG files.

    python benchmarks/loader.py [number of pictures] [batch size]

The pictures are portraits of sources/synthetic_faces.py, saved as JPEG of 178x218 and cut to 64x64. A first pass of ours reads and caches them, which
is what their every pass does; later passes gather from the cache.
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

from data import Shuffle, load_images, to_float
from lab.feed import Feed
from lab.settings import load_config
from sources import TRAIN, synthetic_faces

PEER = "ImageFolder + DataLoader, every epoch"


def write_pictures(folder: Path, count: int) -> None:
    (folder / "faces").mkdir(parents=True)
    for start in range(0, count, 256):
        for i, face in enumerate(synthetic_faces.render(0, np.arange(start, min(start + 256, count)), 218), start=start):
            Image.fromarray(face[:, 20:198]).save(folder / "faces" / f"{i:06d}.jpg", quality=92)


def main(count: int = 4000, batch: int = 64) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        write_pictures(folder, count)
        transform = v2.Compose(
            [v2.CenterCrop(178), v2.Resize(64, antialias=True), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        )
        pictures = ImageFolder(folder, transform)
        loader = DataLoader(
            pictures, batch, shuffle=True, num_workers=os.cpu_count(), drop_last=True, persistent_workers=True
        )
        rates = {}
        for title in ("warm-up", PEER):  # workers and the device start in the first
            started = time.perf_counter()
            seen = sum(len(x.to(DEVICE)) for x, _ in loader)
            wait()
            rates[title] = seen / (time.perf_counter() - started)
        config = load_config(
            None, [f"runs_dir={name}/runs", "data.source=folder", f"data.path={folder}", "data.image_size=64"]
        )
        started = time.perf_counter()
        images = load_images(config)
        rates["ours, first pass (decodes and caches)"] = count / (time.perf_counter() - started)
        rows = torch.from_numpy(images.rows(TRAIN))
        pixels, order = Feed([torch.from_numpy(images.pixels)], DEVICE), Shuffle(len(rows), 0)
        for title in ("warm-up", "ours, every later epoch"):
            started = time.perf_counter()
            for start in range(0, 4 * len(rows), batch):
                to_float(pixels.take(rows[order.take(start, batch)]))
            wait()
            rates[title] = 4 * len(rows) / (time.perf_counter() - started)
        del rates["warm-up"]
    print(f"\n{count:,} JPEG pictures, batches of {batch}, {os.cpu_count()} workers, {machine()}\n")
    peer = rates[PEER]
    print_table(
        ["", "images/s", "ours / theirs"], [[name, f"{rate:,.0f}", f"{rate / peer:.1f}"] for name, rate in rates.items()]
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
