"""Normalization of VAE latents to unit variance."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

RANGE_QUANTILES = (0.0005, 0.9995)  # per channel
RANGE_WIDENING = 1.1
MAX_QUANTILE_VALUES = 2_000_000  # enough for the estimate; sorting is slow


@dataclass
class Normalizer:
    """z = (latent - shift) · scale, and statistics of z over the training set. All fields are float32 (C,)."""

    shift: Tensor
    scale: Tensor
    mean: Tensor
    std: Tensor
    kurtosis: Tensor  # excess: 0 for a Gaussian
    low: Tensor  # RANGE_QUANTILES of z
    high: Tensor

    @classmethod
    def measure(cls, latents: Tensor, kind: str) -> "Normalizer":
        """Fit to VAE means (N, C, h, w). Raises ValueError for a channel without variance.

        global       shift 0, scale 1/std of all values (as in LDM)
        per_channel  zero mean and unit std in each channel
        """
        if kind not in ("global", "per_channel"):
            raise ValueError(f"normalization must be global or per_channel (got {kind!r})")
        # One channel at a time: float64 latents of a large dataset do not fit in memory.
        mean, var, kurtosis, low, high = torch.stack(
            [_moments(channel) for channel in latents.unbind(1)], dim=1
        )  # (C,) each
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
        """VAE means (B, C, h, w) of any float dtype -> z, float32."""
        return (latents.float() - _as_map(self.shift)) * _as_map(self.scale)

    def denormalize(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> latents that the VAE decodes."""
        return z / _as_map(self.scale) + _as_map(self.shift)

    def range(self) -> tuple[Tensor, Tensor]:
        """Bounds on z for thresholding, (C, 1, 1) each: the quantiles, widened by 10 %."""
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


def _moments(channel: Tensor) -> Tensor:
    """Mean, variance, excess kurtosis and the two RANGE_QUANTILES, (5,) float64."""
    values = channel.double()
    centered = values - values.mean()
    var = (centered**2).mean()
    kurtosis = (centered**4).mean() / var.clamp(min=1e-12) ** 2 - 3
    return torch.stack([values.mean(), var, kurtosis, *_quantiles(values)])


def _quantiles(values: Tensor) -> tuple[Tensor, Tensor]:
    flat = values.flatten()
    stride = flat.numel() // MAX_QUANTILE_VALUES | 1  # odd: an even stride would skip columns of the latents
    ordered = flat[::stride].sort().values
    low, high = (ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in RANGE_QUANTILES)
    return low, high
