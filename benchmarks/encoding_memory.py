"""Peak memory of create_encodings.py for growing numbers of images.

    python benchmarks/encoding_memory.py [number of images ...]      default: 20000 200000 1000000

Images of 32 px with random pixels and their mirror images, a small VAE (f = 4, 8x8x8 latents). Anonymous memory is what the
process has allocated. The peak of the whole process also counts pages of memory-mapped files, which the kernel can drop.
"""

import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from timing import machine, print_table

# isort: split
import numpy as np

import create_encodings
import train_vae
from dataset import TRAIN, VAL, sources
from dataset.sources import Source

NUM_VAL = 64


def random_images(cfg, seed: int) -> Source:
    total = cfg.num_images + NUM_VAL
    return Source(
        [f"{i:07d}" for i in range(total)],
        read=lambda rows: list(np.random.default_rng(rows[0]).integers(0, 256, (len(rows), *cfg.size, 3), dtype=np.uint8)),
        cache_key=["random", total],
        split=np.where(np.arange(total) < cfg.num_images, TRAIN, VAL).astype(np.uint8),
    )


def anonymous_bytes() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(folder: str, num_images: int) -> None:
    """Build the image cache, train the VAE for one step, encode, and print the peaks of the encoding."""
    sources.SOURCES["synthetic_faces"] = random_images
    argv = [
        str(Path(__file__).parent.parent / "configs/demo.yaml"), f"runs_dir={folder}", "name=memory", "device=cpu",
        f"data.num_images={num_images}", "data.image_size=32", "vae.channels=[8,16]", "vae.patch_size=2", "vae.steps=1",
        "vae.max_minutes=null", "vae.batch_size=8", "logging.tensorboard=false",
    ]  # fmt: skip
    assert train_vae.main(argv) == 0
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous_bytes())

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    assert create_encodings.main(argv) == 0
    done.set()
    watcher.join()
    print("peaks", before, peak, (Path(folder) / "memory/encodings.pt").stat().st_size, time.perf_counter() - start)


def main(*numbers: str) -> None:
    rows = []
    for number in map(int, numbers or ("20000", "200000", "1000000")):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--measure", folder, str(number)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        before, peak, size, seconds = map(float, output.split("peaks ")[1].split())
        rows.append(
            [f"{number:,}", f"{size / 1e6:,.0f} MB", f"{before / 1e9:.2f} GB", f"{peak / 1e9:.2f} GB", f"{seconds:.0f} s"]
        )
    print(f"\npeak anonymous memory of create_encodings.py, {machine()}\n")
    print_table(["images", "encodings.pt", "before", "peak", "time"], rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], int(sys.argv[3]))
    else:
        main(*sys.argv[1:])
