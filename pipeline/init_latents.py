"""Inputs of sampling: initial noise from one or two seeds, and the image and mask of image-to-image and inpainting."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from config import Config, SamplingConfig
from dataset.files import decode_image
from sampling import image_generators, randn, slerp
from utils.errors import UserError
from utils.files import first_line

DEFAULT_STRENGTH = 0.6  # for image-to-image without a mask


def initial_noise(cfg: SamplingConfig, indices: range, shape: tuple, device) -> tuple[Tensor, list[torch.Generator]]:
    """Return initial noise (B, C, h, w) for the images at `indices`, and one generator per image for later steps.

    Noise is generated on the CPU, so that a seed gives the same image on every device. If sampling.slerp_to is set, the
    noise of each grid row is interpolated from left (sampling.seed) to right (sampling.slerp_to).
    """
    generators = image_generators(cfg.seed, indices, "cpu")
    if cfg.slerp_to is None:
        return randn((len(indices), *shape), generators, device), generators
    noise = []
    for i in indices:
        row, weight = i // cfg.cols, i % cfg.cols / max(1, cfg.cols - 1)
        first, last = (
            randn((1, *shape), image_generators(seed, [row], "cpu"), "cpu")[0] for seed in (cfg.seed, cfg.slerp_to)
        )
        noise.append(slerp(first, last, weight))
    return torch.stack(noise).to(device), generators


@dataclass
class InitImage:
    """Input of image-to-image (sampling.image) and of inpainting (sampling.mask)."""

    pixels: np.ndarray  # (H, W, C) uint8
    mask: np.ndarray | None  # (H, W) bool: True where to generate
    latent_mask: Tensor | None  # (h, w) float: 1 if any pixel of this latent position is to be generated, else 0
    strength: float  # fraction of the sampling steps to run

    @classmethod
    def load(cls, config: Config, image_shape: tuple[int, int, int], downsampling: int) -> "InitImage | None":
        """Read and check sampling.image and sampling.mask; return None if there is no image.

        image_shape: (H, W, C) of the model's images
        downsampling: H / h, from images to latents
        """
        cfg = config.sampling
        if cfg.image is None:
            return None
        pixels = read_image("sampling.image", cfg.image, image_shape, config.data.value_range)
        if cfg.mask is None:
            return cls(pixels, None, None, cfg.strength or DEFAULT_STRENGTH)
        mask = read_image("sampling.mask", cfg.mask, (*image_shape[:2], 3)).mean(axis=2) >= 128
        if not mask.any():
            raise UserError(f"sampling.mask: {cfg.mask} is black everywhere; white marks the area to generate")
        latent_mask = F.max_pool2d(torch.from_numpy(mask)[None, None].float(), downsampling)[0, 0]
        return cls(pixels, mask, latent_mask, cfg.strength or 1.0)

    def restore_unmasked(self, pixels: np.ndarray) -> np.ndarray:
        """Replace pixels (B, H, W, C) outside the mask by those of the given image, because the VAE alters them slightly."""
        return pixels if self.mask is None else np.where(self.mask[None, :, :, None], pixels, self.pixels)


def read_image(key: str, path: str, shape: tuple[int, int, int], value_range: list[float] | None = None) -> np.ndarray:
    """Read an image file as uint8 of shape (H, W, C). `key` is the setting that error messages name."""
    try:
        image = decode_image(Path(path).read_bytes(), shape[2], value_range)
    except Exception as error:  # missing file, not an image, too many pixels: many exception types
        raise UserError(f"{key}: cannot read {path} ({getattr(error, 'strerror', None) or first_line(error)})") from None
    if (image.height, image.width) != shape[:2]:
        raise UserError(
            f"{key}: the width x height of {path} must be {shape[1]}x{shape[0]}, as in the model's images "
            f"(got {image.width}x{image.height}); crop and resize it"
        )
    return np.array(image).reshape(shape)
