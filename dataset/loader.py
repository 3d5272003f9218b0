"""Shuffling and batch loading."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from utils.device import copy_to, free_memory

MAX_MEMORY_FRACTION = 0.4  # of the free device memory, for a dataset that is kept on the device


class BatchLoader:
    """Load batches of rows from the concatenation of `parts`, which are CPU tensors, for example memory-mapped ones.

    If all parts fit into device memory, they are copied there once. Otherwise, a thread gathers the next batch into pinned
    host memory while the current one is in use.
    """

    def __init__(self, parts: list[Tensor], device: torch.device):
        self.parts, self.device = parts, device
        self.num_bytes = sum(part.numel() * part.element_size() for part in parts)
        self.resident = device.type == "cpu" or self.num_bytes <= MAX_MEMORY_FRACTION * free_memory(device)
        if self.resident and device.type != "cpu":
            whole = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype, device=device)
            for part, target in zip(parts, whole.split([len(part) for part in parts])):
                target.copy_(part)
            self.parts = [whole]
        self._executor = ThreadPoolExecutor(1)
        self._prefetched: tuple[Tensor, Future] | None = None  # row indices, and the batch of these rows

    def __str__(self) -> str:
        placement = f"on {self.device}" if self.resident else f"prefetched from host memory (too large for {self.device})"
        return f"{self.num_bytes / 1e6:,.0f} MB {placement}"

    def batch(self, rows: Tensor, next_rows: Tensor | None = None) -> Tensor:
        """Gather the rows with CPU indices `rows` (B,) into (B, …) on the device, and prefetch `next_rows`."""
        if self.resident:
            return self._gather(copy_to(rows, self.device))
        prefetched, self._prefetched = self._prefetched, None
        hit = prefetched is not None and torch.equal(prefetched[0], rows)
        batch = prefetched[1].result() if hit else self._gather_pinned(rows)
        if next_rows is not None:
            self._prefetched = next_rows, self._executor.submit(self._gather_pinned, next_rows)
        return batch.to(self.device, non_blocking=True)

    def _gather_pinned(self, rows: Tensor) -> Tensor:
        batch = self._gather(rows)
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def _gather(self, rows: Tensor) -> Tensor:
        if len(self.parts) == 1:
            return self.parts[0][rows]
        batch, start = torch.empty(len(rows), *self.parts[0].shape[1:], dtype=self.parts[0].dtype), 0
        for part in self.parts:
            in_part = (rows >= start) & (rows < start + len(part))
            batch[in_part] = part[rows[in_part] - start]
            start += len(part)
        return batch


class Shuffle:
    """Infinite sequence of shuffled epochs over n items. It depends on the seed alone, so resuming needs no saved state."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self._epochs: dict[int, Tensor] = {}

    def indices(self, start: int, count: int) -> Tensor:
        """Return items start … start+count-1 of the sequence, (count,) int64."""
        positions = torch.arange(start, start + count)
        first, last = start // self.n, (start + count - 1) // self.n
        self._epochs = {e: self._epochs[e] if e in self._epochs else self._permutation(e) for e in range(first, last + 1)}
        items = self._epochs[first] if first == last else torch.cat([self._epochs[e] for e in range(first, last + 1)])
        return items[positions - first * self.n]

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
