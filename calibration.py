"""Does what is generated spread like what was trained on? The figures of infer.py's calibration line, and what to do about them."""

import torch
from torch import Tensor

from config import Sampling
from models.latents import Normaliser


class Moments:
    """Mean and std per channel of latents that come in batches, in float64."""

    def __init__(self, channels: int):
        self.n = 0
        self.sum, self.squares = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)

    def add(self, z: Tensor) -> None:
        z = z.cpu().double()
        self.n += z.numel() // z.shape[1]
        self.sum += z.sum(dim=(0, 2, 3))
        self.squares += z.square().sum(dim=(0, 2, 3))

    def join(self, other: "Moments") -> None:
        self.n, self.sum, self.squares = self.n + other.n, self.sum + other.sum, self.squares + other.squares

    def std(self) -> Tensor:
        """(C,)"""
        return (self.squares / self.n - (self.sum / self.n) ** 2).clamp(min=0).sqrt()

    def overall_std(self) -> float:
        """Std of all values, the channels taken together."""
        return float((self.squares.mean() / self.n - (self.sum.mean() / self.n) ** 2).clamp(min=0).sqrt())


def calibration(moments: Moments, normaliser: Normaliser, clamped: float, out_of_range: float) -> dict:
    """Generated against training spread; 1 is perfect. The worst channel is the one farthest from 1 by ratio."""
    ratios = moments.std() / normaliser.std.cpu().double().clamp(min=1e-12)
    worst = int(ratios.clamp(min=1e-12).log().abs().argmax())
    return dict(
        std_ratio=moments.overall_std() / normaliser.overall_std(),
        worst_channel_ratio=float(ratios[worst]),
        worst_channel=worst,
        clamped=clamped,
        out_of_range=out_of_range,
    )


def advice(figures: dict, s: Sampling) -> list[str]:
    """A warning that names the likely cause where the spread is off by more than a tenth."""
    ratio, worst = figures["std_ratio"], figures["worst_channel_ratio"]
    if 0.9 <= ratio <= 1.1 and 0.9 <= worst <= 1.1:
        return []
    off = worst if 0.9 <= ratio <= 1.1 else ratio
    if off < 0.9 and figures["clamped"] > 0.02 and s.x0_clamp != "range":
        cause = f"the clean estimate is clamped too hard (sampling.x0_clamp={s.x0_clamp}): use range"
    elif off < 0.9 and s.steps < 20:
        cause = f"{s.steps} steps are few: use sampling.steps=50"
    elif off > 1.1 and ((s.sigma_max or 0) > 80 and s.x0_clamp == "none"):
        cause = "errors at the noisy end of the schedule are amplified: use sampling.sigma_max=80 and x0_clamp=range"
    elif off > 1.1 and s.x0_clamp == "none":
        cause = "nothing bounds the clean estimate: use sampling.x0_clamp=range"
    else:
        cause = "the U-Net is not trained enough; look at the held-out loss by timestep bin"
    return [
        f"warning: generated latents are {'narrower' if off < 1 else 'wider'} than training latents ({off:.2f}); likely cause: {cause}"
    ]
