"""Batches for the device: of an array that lives there, or that is read ahead of time from where it lies."""

from concurrent.futures import Future, ThreadPoolExecutor

import psutil
import torch
from torch import Tensor

MOST = 0.4  # of the device's free memory


class Feed:
    """Rows of an array on the CPU (a memory map, say), given in one or several parts that lie one behind the other.

    Where they fit, all of it is copied to the device at once, and a batch is a gather there. Else a thread gathers the batch
    that will be asked for next, into pinned memory, while the device works on this one.
    """

    def __init__(self, parts: list[Tensor], device: torch.device):
        self.parts, self.device = parts, device
        self.bytes = sum(part.numel() * part.element_size() for part in parts)
        self.resident = device.type == "cpu" or self.bytes <= MOST * free_memory(device)
        if self.resident and device.type != "cpu":
            whole = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype, device=device)
            for part, place in zip(parts, whole.split([len(part) for part in parts])):
                place.copy_(part)
            self.parts = [whole]
        self._reader = ThreadPoolExecutor(1)
        self._expected: tuple[Tensor, Future] | None = None

    def __str__(self) -> str:
        where = f"on {self.device}" if self.resident else f"read a batch ahead, as they do not fit {self.device}"
        return f"{self.bytes / 1e6:,.0f} MB {where}"

    def take(self, rows: Tensor, then: Tensor | None = None) -> Tensor:
        """Rows (B,) int64, on the CPU -> (B, …) of the array's own type, on the device. `then`: the rows that come next."""
        if self.resident and self.device.type == "cuda":
            rows = rows.pin_memory()  # many rows' copy would wait otherwise
        if self.resident:
            return self._gather(rows.to(self.device, non_blocking=True))
        expected, self._expected = self._expected, None
        batch = expected[1].result() if expected and torch.equal(expected[0], rows) else self._read(rows)
        if then is not None:
            self._expected = then, self._reader.submit(self._read, then)
        return batch.to(self.device, non_blocking=True)

    def _read(self, rows: Tensor) -> Tensor:
        batch = self._gather(rows)
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def _gather(self, rows: Tensor) -> Tensor:
        if len(self.parts) == 1:
            return self.parts[0][rows]
        batch, start = torch.empty(len(rows), *self.parts[0].shape[1:], dtype=self.parts[0].dtype), 0
        for part in self.parts:
            here = (rows >= start) & (rows < start + len(part))
            batch[here] = part[rows[here] - start]
            start += len(part)
        return batch


def free_memory(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
