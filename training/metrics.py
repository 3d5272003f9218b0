"""Running averages of training metrics, kept on the device so that logging does not force a sync in every step."""

import torch
from torch import Tensor

from utils import distributed


class MetricAverager:
    """Averages of metrics since the last log line. Also records the first step with a non-finite loss or gradient."""

    def __init__(self, device: torch.device):
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}  # number of steps that reported each metric
        self._micro_batches: list[dict[str, Tensor]] = []  # metrics of the current step's micro-batches
        self._global: set[str] = set()  # names of the metrics that have the same value in every process
        self._nonfinite = torch.full((2,), -1, device=device)  # (step, timestep) of the first non-finite value; -1: none

    def add_micro_batch(self, metrics: dict[str, Tensor], batch_size: int) -> None:
        """Add the metrics (B,) of one micro-batch. batch_size is the size of the whole batch, over all processes."""
        self._micro_batches.append({name: value.detach().float().sum() / batch_size for name, value in metrics.items()})

    def discard_step(self) -> None:
        """Forget the micro-batches of the current step, because it will be repeated."""
        self._micro_batches = []

    def end_step(self, **global_metrics: Tensor) -> None:
        """Close the step. `global_metrics` are scalars that have the same value in every process."""
        for part in [{name: value.detach().float() for name, value in global_metrics.items()}, *self._micro_batches]:
            for name, value in part.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
        for name in global_metrics.keys() | {name for part in self._micro_batches for name in part}:
            self._counts[name] = self._counts.get(name, 0) + 1
        self._micro_batches, self._global = [], set(global_metrics)

    def means(self) -> dict[str, float]:
        """Average each metric over its steps and over all processes, then reset. Empty if there was no step."""
        if not self._sums:
            return {}
        local_names, global_names = sorted(self._sums.keys() - self._global), sorted(self._global)
        totals = distributed.all_reduce_sum(torch.stack([self._sums[name] for name in local_names])).tolist()
        totals += torch.stack([self._sums[name] for name in global_names]).tolist()
        means = {name: total / self._counts[name] for name, total in zip([*local_names, *global_names], totals)}
        self._sums, self._counts = {}, {}
        return means

    def watch_finite(self, values: Tensor, step: int, timesteps: Tensor | None = None) -> None:
        """Record the step of the first non-finite value, and its timestep if `timesteps` (one per value) is given."""
        nonfinite = ~torch.isfinite(values)
        timestep = torch.full_like(self._nonfinite[0], -1)
        if timesteps is not None:
            timestep = torch.where(nonfinite.any(), timesteps.gather(0, nonfinite.long().argmax()[None])[0], timestep)
        is_first = nonfinite.any() & (self._nonfinite[0] < 0)
        self._nonfinite = torch.where(is_first, torch.stack([torch.full_like(timestep, step), timestep]), self._nonfinite)

    def first_nonfinite(self) -> tuple[int, int]:
        """Return (step, timestep) of the first non-finite value, or (-1, -1) if there is none. Syncs with the device.

        The timestep is -1 if watch_finite() was called without timesteps.
        """
        step, timestep = self._nonfinite.tolist()
        return step, timestep
