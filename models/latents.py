"""What the U-Net's world looks like: how VAE means become unit-variance latents, and what their values range over."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

RANGE_QUANTILES = (0.0005, 0.9995)  # per channel; the clamp `range` is this, widened 10 %
RANGE_WIDENING = 1.1


@dataclass
class Normaliser:
    """z = (mean - shift) · scale. All fields are float32 tensors (C,), statistics being those of z over the training set."""

    shift: Tensor
    scale: Tensor
    mean: Tensor
    std: Tensor
    kurtosis: Tensor  # excess: 0 for a Gaussian
    low: Tensor  # quantiles of z
    high: Tensor

    @classmethod
    def measure(cls, latents: Tensor, kind: str) -> "Normaliser":
        """From VAE means (N, C, h, w). "global": shift 0, scale 1/std of all values (as LDM); "per_channel": zero mean, unit std.

        Raises ValueError for a channel without variance, and for another kind.
        """
        channels = latents.shape[1]
        # float64 sums, one channel at a time: the whole set in float64 would not fit beside itself.
        moments = []
        for c in range(channels):
            values = latents[:, c].double()
            centred = values - values.mean()
            var = (centred**2).mean()
            kurtosis = (centred**4).mean() / var.clamp(min=1e-12) ** 2 - 3
            low, high = _quantiles(values)
            moments.append(torch.stack([values.mean(), var, kurtosis, low, high]))
        mean, var, kurtosis, low, high = torch.stack(moments, dim=1)  # (C,) each
        if kind not in ("global", "per_channel"):
            raise ValueError(f"normaliser {kind!r} does not exist; there are: global, per_channel")
        if kind == "global":
            total_var = (var + mean**2).mean() - mean.mean() ** 2
            shift, scale = torch.zeros(channels), total_var.rsqrt().expand(channels)
        else:
            shift, scale = mean, var.rsqrt()
        if not torch.isfinite(scale).all() or not (var > 0).all():
            raise ValueError(
                "a latent channel has no variance: the VAE does not use it (train longer, or fewer latent_channels)"
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

    def normalise(self, latents: Tensor) -> Tensor:
        """VAE means (B, C, h, w) of any float type -> z, float32."""
        return (latents.float() - _as_map(self.shift)) * _as_map(self.scale)

    def denormalise(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> what the VAE decodes."""
        return z / _as_map(self.scale) + _as_map(self.shift)

    def range(self) -> tuple[Tensor, Tensor]:
        """Bounds on z for thresholding, (C, 1, 1) each: the measured quantiles, widened 10 % about their middle."""
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        return _as_map(middle - RANGE_WIDENING * half), _as_map(middle + RANGE_WIDENING * half)

    def overall_std(self) -> float:
        """Std of all values of z over the training set, the channels taken together."""
        std, mean = self.std.cpu().double(), self.mean.cpu().double()  # MPS has no float64
        return float(((std**2 + mean**2).mean() - mean.mean() ** 2).sqrt())

    def to(self, device) -> "Normaliser":
        return Normaliser(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        return {prefix + f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], prefix: str = "") -> "Normaliser":
        return cls(**{f.name: state[prefix + f.name] for f in fields(cls)})


def _as_map(values: Tensor) -> Tensor:
    return values[:, None, None]  # (C, 1, 1)


def _quantiles(values: Tensor) -> tuple[Tensor, Tensor]:
    """The RANGE_QUANTILES of a tensor, from at most two million evenly taken values (sorting more gains nothing)."""
    flat = values.flatten()
    stride = flat.numel() // 2_000_000 | 1  # odd: an even one would see some columns of the latents alone
    ordered = flat[::stride].sort().values
    low, high = (ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in RANGE_QUANTILES)
    return low, high
