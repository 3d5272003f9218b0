"""Statistics of generated latents relative to the training latents, and warnings if the two differ."""

import torch
from torch import Tensor

from config import SamplingConfig
from models.normalizer import Normalizer
from utils.errors import UserError


class Moments:
    """Running mean and std per channel of latents (B, C, h, w), in float64."""

    def __init__(self, channels: int):
        self.n = 0
        self.sum, self.sum_squares = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)

    def add(self, z: Tensor) -> None:
        z = z.cpu().double()
        self.n += z.numel() // z.shape[1]
        self.sum += z.sum(dim=(0, 2, 3))
        self.sum_squares += z.square().sum(dim=(0, 2, 3))

    def merge(self, other: "Moments") -> None:
        self.n, self.sum = self.n + other.n, self.sum + other.sum
        self.sum_squares = self.sum_squares + other.sum_squares

    def std(self) -> Tensor:
        """Return the std per channel, (C,)."""
        return (self.sum_squares / self.n - (self.sum / self.n) ** 2).clamp(min=0).sqrt()

    def overall_std(self) -> float:
        """Return the std over all values of all channels."""
        return float((self.sum_squares.mean() / self.n - (self.sum.mean() / self.n) ** 2).clamp(min=0).sqrt())


def require_finite(moments: Moments, cfg: SamplingConfig) -> None:
    if not torch.isfinite(moments.sum_squares).all():
        raise UserError(
            f"sampling produced NaN or infinity: use sampling.x0_clamp=range (got {cfg.x0_clamp}) and a smaller "
            f"sampling.guidance (got {cfg.guidance:g})"
        )


def latent_stats(moments: Moments, normalizer: Normalizer, clamped: float, out_of_range: float) -> dict:
    """Return the statistics to report: std of generated latents / std of training latents (1 is ideal), and both arguments.

    The ratio is over all values and for the worst channel, whose log ratio is farthest from 0.

    clamped       fraction of clean estimates that were clamped
    out_of_range  fraction of decoded pixels outside [-1, 1]
    """
    ratios = moments.std() / normalizer.std.cpu().double().clamp(min=1e-12)
    worst = int(ratios.clamp(min=1e-12).log().abs().argmax())
    return dict(
        std_ratio=moments.overall_std() / normalizer.overall_std(),
        worst_channel_ratio=float(ratios[worst]),
        worst_channel=worst,
        clamped=clamped,
        out_of_range=out_of_range,
    )


def std_warnings(stats: dict, cfg: SamplingConfig) -> list[str]:
    """Return a warning with the likely cause if the latents' std ratio (generated / training) is outside 0.9 … 1.1, else []."""
    ratio, worst = stats["std_ratio"], stats["worst_channel_ratio"]
    if 0.9 <= ratio <= 1.1 and 0.9 <= worst <= 1.1:
        return []
    off = worst if 0.9 <= ratio <= 1.1 else ratio
    if off < 0.9 and stats["clamped"] > 0.02 and cfg.x0_clamp != "range":
        cause = f"sampling.x0_clamp={cfg.x0_clamp} clamps the clean estimate too tightly: use x0_clamp=range"
    elif off < 0.9 and cfg.steps < 20:
        cause = f"sampling.steps={cfg.steps} is too few: use steps=25"
    elif off > 1.1 and ((cfg.sigma_max or 0) > 70 and cfg.x0_clamp == "none"):
        cause = "sampling amplifies errors at the highest noise levels: use sampling.sigma_max=70 and x0_clamp=range"
    elif off > 1.1 and cfg.x0_clamp == "none":
        cause = "the clean estimate is not bounded: use sampling.x0_clamp=range"
    else:
        cause = "the U-Net is undertrained: check the validation loss per timestep bin"
    size = "smaller" if off < 1 else "larger"
    return [f"warning: the std of generated latents is {size} than in training (ratio {off:.2f}). Likely cause: {cause}"]
