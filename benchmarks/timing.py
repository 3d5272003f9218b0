"""Interleaved timings (A B A B) after warm-up, FLOP counts, and the peak throughput of the machine."""

import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).parent.parent))  # the project

from utils import cli  # noqa: F401  sets THP_MEM_ALLOC_ENABLE, which torch reads when it is imported

# isort: split
import torch
from torch.utils.flop_counter import FlopCounterMode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def interleaved(runs: dict[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds per run."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-warmup, repeats):
        for name, run in runs.items():
            wait()
            started = time.perf_counter()
            run()
            wait()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def flops_of(run: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and convolutions in one call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def peak_flops(dtype: torch.dtype) -> float:
    """Measured operations per second of a large square matrix product."""
    n = 8192 if DEVICE.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * n**3 / interleaved({"product": lambda: a @ b}, repeats=10)["product"]


def machine() -> str:
    name = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return f"{name}, torch {torch.__version__}"


def print_table(headings: list[str], rows: list[list[str]]) -> None:
    for cells in (headings, ["---"] * len(headings), *rows):
        print("| " + " | ".join(cells) + " |", flush=True)
