"""Types for LatentDiffusion.generate(): OutputSpec selects the outputs, and Samples holds them."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from models.normalizer import Normalizer
from pipeline.latent_stats import Moments, latent_stats
from utils import distributed


@dataclass
class OutputSpec:
    """Which outputs of generate() to keep."""

    num_images: int
    keep_pixels: int = 0  # return the pixels of this many images; if 0 and save_dir is None, decode nothing
    keep_latents: bool = False  # return the latents of all images
    trajectory: list[int] = field(default_factory=list)  # images whose clean estimates z0_hat are recorded
    save_dir: Path | None = None  # write every image to this folder
    distributed: bool = False  # divide the images among all processes; False: this process generates all

    def batches(self, batch_size: int) -> list[range]:
        """Return the image indices of each batch that this process generates."""
        ranks, rank = (distributed.world_size(), distributed.rank()) if self.distributed else (1, 0)
        batch_size = min(batch_size, -(-self.num_images // ranks))
        starts = range(0, self.num_images, batch_size)[rank::ranks]
        return [range(start, min(start + batch_size, self.num_images)) for start in starts]


@dataclass
class Samples:
    """Generated images and their statistics. Dictionaries are keyed by image index."""

    moments: Moments
    num_clamped: int = 0  # number of clamped values in all clean estimates
    num_values: int = 0  # number of values in all clean estimates
    num_out_of_range: int = 0  # number of pixel values outside [-1, 1]
    num_pixel_values: int = 0  # number of pixel values in all images
    latents: dict[int, Tensor] = field(default_factory=dict)  # (C, h, w)
    pixels: dict[int, np.ndarray] = field(default_factory=dict)  # (H, W, C) uint8
    trajectory: dict[int, list[Tensor]] = field(default_factory=dict)  # z0_hat (C, h, w), from noise to image

    @classmethod
    def merge(cls, parts: "list[Samples]") -> "Samples":
        """Merge the samples of all processes into parts[0] and return it."""
        total = parts[0]
        for part in parts[1:]:
            total.moments.merge(part.moments)
            for name in ("num_clamped", "num_values", "num_out_of_range", "num_pixel_values"):
                setattr(total, name, getattr(total, name) + getattr(part, name))
            total.latents |= part.latents
            total.pixels |= part.pixels
            total.trajectory |= part.trajectory
        return total

    def pixel_array(self) -> np.ndarray:
        """Return all pixels, uint8 (N, H, W, C), ordered by image index."""
        return np.stack([self.pixels[i] for i in sorted(self.pixels)])

    def stats(self, normalizer: Normalizer) -> dict:
        """Return the statistics of latent_stats() for these samples."""
        clamped = self.num_clamped / max(self.num_values, 1)
        return latent_stats(self.moments, normalizer, clamped, self.num_out_of_range / max(self.num_pixel_values, 1))
