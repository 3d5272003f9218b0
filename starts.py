"""What sampling starts from: the noise of a seed, what lies between two seeds, or a given picture."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from config import Sampling
from data import to_float
from lab.artifacts import first_line
from lab.errors import UserError
from latent_diffusion import LatentDiffusion
from sampling import image_generators, randn, slerp
from sources.files import decode


def noise_of(s: Sampling, indices: range, shape: tuple, device) -> tuple[Tensor, list[torch.Generator]]:
    """Noise (B, C, h, w) of these images, and the generators that go on from there. Drawn on the CPU: a seed is the same
    noise for every device."""
    if s.slerp_to is None:
        generators = image_generators(s.seed, indices, "cpu")
        return randn((len(indices), *shape), generators, device), generators
    noise = []
    for i in indices:  # row by row, from image `row` of one seed to that of the other
        row, share = i // s.cols, i % s.cols / max(1, s.cols - 1)
        here, there = (randn((1, *shape), image_generators(seed, [row], "cpu"), "cpu")[0] for seed in (s.seed, s.slerp_to))
        noise.append(slerp(here, there, share))
    return torch.stack(noise).to(device), image_generators(s.seed, indices, "cpu")


@dataclass
class Given:
    """A picture to start from, and what of it is to be drawn anew."""

    pixels: np.ndarray  # (H, W, 3) uint8
    latent: Tensor  # (1, C, h, w)
    mask: np.ndarray | None  # (H, W) bool, true where to draw
    latent_mask: Tensor | None  # (h, w) float: 1 where any of the latent's pixels is to be drawn

    @classmethod
    def load(cls, s: Sampling, model: LatentDiffusion) -> "Given":
        """Raises UserError for pictures that cannot be read or are of another size than the model's."""
        pixels = read_picture("sampling.image", s.image, model.image_size)
        latent = model.encode(to_float(torch.from_numpy(pixels)[None]))
        if s.mask is None:
            return cls(pixels, latent, None, None)
        mask = read_picture("sampling.mask", s.mask, model.image_size).mean(axis=2) >= 128
        if not mask.any():
            raise UserError(f"sampling.mask: {s.mask} is black everywhere; what is to be drawn is white")
        latent_mask = F.max_pool2d(torch.from_numpy(mask)[None, None].float(), model.vae.downsampling)[0, 0]
        return cls(pixels, latent, mask, latent_mask.to(latent.device))

    def keep(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) with the given picture's own pixels wherever they were not to be drawn."""
        return pixels if self.mask is None else np.where(self.mask[None, :, :, None], pixels, self.pixels)


def read_picture(key: str, path: str, size: int) -> np.ndarray:
    """(size, size, 3) uint8"""
    try:
        picture = np.array(decode(Path(path).read_bytes()))
    except Exception as error:  # no such file, no picture, one that Pillow takes for a bomb
        raise UserError(f"{key}: {path} cannot be read ({getattr(error, 'strerror', None) or first_line(error)})") from None
    if picture.shape[:2] != (size, size):
        raise UserError(
            f"{key}: {path} is {picture.shape[1]}x{picture.shape[0]}; this model's pictures are {size}x{size}: crop and resize it"
        )
    return picture
