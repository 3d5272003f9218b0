"""The VAE (Kingma & Welling 2014; architecture after Esser et al. 2021 and Rombach et al. 2022): pixels <-> latents."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Attention, Downsample, ResBlock, Upsample, norm, recomputed

PIXELS_AT_ONCE = 2**20  # encoded or decoded where no gradient is wanted: 4 images of 512x512, 256 of 64x64


@dataclass
class Posterior:
    """A diagonal Gaussian q(z | x): mean and logvar, (B, C, h, w) float32."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """By the reparametrisation trick, from standard normal noise (B, C, h, w) or fresh one."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, per latent element (B, C, h, w); the reduction is the caller's."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar)


class VAE(nn.Module):
    """Convolutional VAE. widths[i] are the channels at level i; each further level halves the picture.

    downsampling f = patch · 2^(levels-1): images (B, 3, H, W) in [-1, 1] <-> latents (B, latent_channels, H/f, W/f).
    `patch` > 1 first folds patch×patch pixels into channels, which makes the costly first level cheap.
    output "tanh" bounds the decoder to [-1, 1]; "none" leaves it linear.
    """

    def __init__(
        self,
        widths: list[int],
        blocks: int,
        latent_channels: int,
        attention: bool = False,
        patch: int = 1,
        output: str = "none",
    ):
        super().__init__()
        self.settings = dict(
            widths=list(widths),
            blocks=blocks,
            latent_channels=latent_channels,
            attention=attention,
            patch=patch,
            output=output,
        )
        self.downsampling = patch * 2 ** (len(widths) - 1)
        self.latent_channels, self.patch, self.output = latent_channels, patch, output
        self.checkpointing = False  # recompute activations in the backward pass

        # encoder: widths[0] → widths[-1]
        layers: list[nn.Module] = [nn.PixelUnshuffle(patch), nn.Conv2d(3 * patch**2, widths[0], 3, padding=1)]
        channels = widths[0]
        for level, width in enumerate(widths):
            if level > 0:
                layers.append(Downsample(channels))
            for _ in range(blocks):
                layers.append(ResBlock(channels, width))
                channels = width
        layers += self._middle(channels, attention)
        layers += [norm(channels), nn.SiLU(), nn.Conv2d(channels, 2 * latent_channels, 3, padding=1)]
        self.encoder = nn.Sequential(*layers)

        # decoder: widths[-1] → widths[0]
        layers = [nn.Conv2d(latent_channels, channels, 3, padding=1), *self._middle(channels, attention)]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks):
                layers.append(ResBlock(channels, width))
                channels = width
            if level > 0:
                layers.append(Upsample(channels, widths[level - 1]))
                channels = widths[level - 1]
        layers += [norm(channels), nn.SiLU(), nn.Conv2d(channels, 3 * patch**2, 3, padding=1), nn.PixelShuffle(patch)]
        self.decoder = nn.Sequential(*layers)

    @staticmethod
    def _middle(channels: int, attention: bool) -> list[nn.Module]:
        return (
            [ResBlock(channels, channels), Attention(channels), ResBlock(channels, channels)]
            if attention
            else [ResBlock(channels, channels)]
        )

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution."""
        return self.decoder[-2].weight

    def encode(self, images: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] -> q(z | x). H and W are multiples of the down-sampling factor, else ValueError."""
        if images.shape[-1] % self.downsampling or images.shape[-2] % self.downsampling:
            raise ValueError(
                f"images of {images.shape[-1]}x{images.shape[-2]} do not divide by the down-sampling factor {self.downsampling}"
            )
        mean, logvar = self._through(self.encoder, images, images.shape[2] * images.shape[3]).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))  # exp() stays finite in float32

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, C, h, w) -> images (B, 3, H, W) float32, about in [-1, 1] (exactly so with output "tanh")."""
        images = self._through(self.decoder, z, z.shape[2] * z.shape[3] * self.downsampling**2)
        return torch.tanh(images) if self.output == "tanh" else images

    def _through(self, layers: nn.Sequential, x: Tensor, pixels: int) -> Tensor:
        """float32. Where no gradient is wanted, images of so many pixels a few at a time: their largest maps would not fit."""
        parts = [x] if torch.is_grad_enabled() else x.split(max(1, PIXELS_AT_ONCE // pixels))

        def one(part: Tensor) -> Tensor:
            if not self.checkpointing:
                return layers(part)
            for layer in layers:
                part = recomputed(layer, part)
            return part

        return torch.cat([one(part).float() for part in parts])

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Posterior]:
        """Reconstruction of one posterior sample, and the posterior."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(noise)), posterior


def reconstruction_error(kind: str, images: Tensor, reconstruction: Tensor) -> Tensor:
    """Per-pixel error (B, 3, H, W): "mse" or "l1". Raises KeyError for another kind."""
    return {"mse": F.mse_loss, "l1": F.l1_loss}[kind](reconstruction, images, reduction="none")
