"""Normalization of VAE latents to unit variance."""

from dataclasses import dataclass, fields
from typing import Callable

import torch
from torch import Tensor

RANGE_QUANTILES = (0.0005, 0.9995)  # of the values of a channel; they define Normalizer.low and high
RANGE_WIDENING = 1.1  # factor by which Normalizer.range() widens [low, high]
MAX_QUANTILE_VALUES = 2_000_000  # quantiles are estimated from about this many values, because sorting is slow
ROWS_AT_A_TIME = 4096  # latents that are read at a time to compute moments


@dataclass
class Normalizer:
    """Shift and scale that map latents to z = (latent - shift) · scale, and statistics of z over the training set.

    All fields are float32 (C,).
    """

    shift: Tensor
    scale: Tensor
    mean: Tensor
    std: Tensor
    kurtosis: Tensor  # excess kurtosis: 0 for a Gaussian
    low: Tensor  # quantile RANGE_QUANTILES[0] of z
    high: Tensor  # quantile RANGE_QUANTILES[1] of z

    @classmethod
    def measure(cls, latents: Tensor, kind: str) -> "Normalizer":
        """Fit to posterior means (N, C, h, w) of the VAE. Raises ValueError for a channel without variance.

        global       shift 0, scale 1/std of all values (as in LDM)
        per_channel  zero mean and unit std in each channel
        """
        if kind not in ("global", "per_channel"):
            raise ValueError(f"normalization must be global or per_channel (got {kind!r})")
        mean, var, kurtosis = _moments(latents)
        low, high = torch.stack([_quantiles(latents, c) for c in range(latents.shape[1])], dim=1)  # (C,) each
        if kind == "global":
            total_var = (var + mean**2).mean() - mean.mean() ** 2
            shift, scale = torch.zeros(len(mean)), total_var.rsqrt().expand(len(mean))
        else:
            shift, scale = mean, var.rsqrt()
        if not torch.isfinite(scale).all() or not (var > 0).all():
            raise ValueError(
                "a latent channel has no variance, because the VAE does not use it: train longer or reduce latent_channels"
            )
        values = dict(
            shift=shift,
            scale=scale,
            mean=(mean - shift) * scale,
            std=var.sqrt() * scale,
            kurtosis=kurtosis,
            low=(low - shift) * scale,
            high=(high - shift) * scale,
        )
        return cls(**{name: value.float().contiguous() for name, value in values.items()})

    def normalize(self, latents: Tensor) -> Tensor:
        """Posterior means (B, C, h, w) of any float dtype -> z, float32."""
        return (latents.float() - _as_map(self.shift)) * _as_map(self.scale)

    def denormalize(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> latents that the VAE decodes."""
        return z / _as_map(self.scale) + _as_map(self.shift)

    def range(self) -> tuple[Tensor, Tensor]:
        """Bounds on z for thresholding, (C, 1, 1) each: the range [low, high], widened by 10 %."""
        center, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        return _as_map(center - RANGE_WIDENING * half), _as_map(center + RANGE_WIDENING * half)

    def overall_std(self) -> float:
        """Std of z over the training set and all channels."""
        std, mean = self.std.cpu().double(), self.mean.cpu().double()  # MPS has no float64
        return float(((std**2 + mean**2).mean() - mean.mean() ** 2).sqrt())

    def to(self, device) -> "Normalizer":
        return Normalizer(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        return {prefix + f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], prefix: str = "") -> "Normalizer":
        return cls(**{f.name: state[prefix + f.name] for f in fields(cls)})


def _as_map(values: Tensor) -> Tensor:
    return values[:, None, None]  # (C, 1, 1)


def _moments(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and excess kurtosis per channel of latents (N, C, h, w). Each result is (C,) float64.

    The latents are read in blocks, because those of a large dataset are memory-mapped and do not fit in memory.
    """

    def mean_of(function: Callable[[Tensor], Tensor]) -> Tensor:
        sums = [function(rows.double()).mean(dim=(2, 3)).sum(dim=0) for rows in latents.split(ROWS_AT_A_TIME)]
        return torch.stack(sums).sum(dim=0) / len(latents)

    mean = mean_of(lambda z: z)
    var = mean_of(lambda z: (z - _as_map(mean)) ** 2)
    fourth = mean_of(lambda z: (z - _as_map(mean)) ** 4)
    return mean, var, fourth / var.clamp(min=1e-12) ** 2 - 3


def _quantiles(latents: Tensor, channel: int) -> Tensor:
    """Estimate the two RANGE_QUANTILES of a channel of latents (N, C, h, w) from a subset of its values. (2,) float64."""
    n, _, height, width = latents.shape
    stride = n * height * width // MAX_QUANTILE_VALUES | 1  # odd, because an even stride would skip whole columns of latents
    index = torch.arange(0, n * height * width, stride)
    ordered = latents[index // (height * width), channel, index // width % height, index % width].double().sort().values
    return torch.stack([ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in RANGE_QUANTILES])
