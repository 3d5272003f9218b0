"""What training says of itself, gathered on the device: reading it every step would wait for what the device has still to do."""

import torch
from torch import Tensor

from lab import parallel


class Figures:
    """Averages over the steps since the last report, and the first step with a value that is not finite."""

    def __init__(self, device: torch.device):
        self._sums: dict[str, Tensor] = {}  # of figures since the last report
        self._counts: dict[str, int] = {}  # of steps that had each of them
        self._parts: list[dict[str, Tensor]] = []  # of this step's micro-batches
        self._whole: set[str] = set()  # those that are the whole batch's in every process
        self._broken = torch.full((2,), -1, device=device)  # step, and timestep where there is one

    def add_part(self, figures: dict[str, Tensor], whole: int) -> None:
        """Figures (B,) of a micro-batch of a batch of `whole`."""
        self._parts.append({name: value.detach().float().sum() / whole for name, value in figures.items()})

    def drop_parts(self) -> None:
        """Of a step that is begun anew."""
        self._parts = []

    def end_step(self, **figures: Tensor) -> None:
        """With figures (scalars) that are the whole batch's in every process."""
        for part in [{name: value.detach().float() for name, value in figures.items()}, *self._parts]:
            for name, value in part.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
        for name in figures.keys() | {name for part in self._parts for name in part}:
            self._counts[name] = self._counts.get(name, 0) + 1
        self._parts, self._whole = [], set(figures)

    def means(self) -> dict[str, float]:
        """Over the steps that had each figure and over all processes, and begin anew; empty where there was no step."""
        if not self._sums:
            return {}
        shared, whole = sorted(self._sums.keys() - self._whole), sorted(self._whole)
        totals = parallel.total(torch.stack([self._sums[name] for name in shared])).tolist()
        totals += torch.stack([self._sums[name] for name in whole]).tolist()
        means = {name: total / self._counts[name] for name, total in zip([*shared, *whole], totals)}
        self._sums, self._counts = {}, {}
        return means

    def watch(self, values: Tensor, step: int, timesteps: Tensor | None = None) -> None:
        """Remember this step, and the timestep (timesteps: of values' shape), if it is the first with a value that is not finite."""
        broken = ~torch.isfinite(values)
        timestep = torch.full_like(self._broken[0], -1)
        if timesteps is not None:
            timestep = torch.where(broken.any(), timesteps.gather(0, broken.long().argmax()[None])[0], timestep)
        first = broken.any() & (self._broken[0] < 0)
        self._broken = torch.where(first, torch.stack([torch.full_like(timestep, step), timestep]), self._broken)

    def first_broken(self) -> tuple[int, int]:
        """(step, timestep), -1 where there is none."""
        step, timestep = self._broken.tolist()
        return step, timestep
