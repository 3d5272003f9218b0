"""VAE between pixels and latents (Kingma & Welling 2014). Architecture: Esser et al. 2021; Rombach et al. 2022.

It computes the same function as diffusers' AutoencoderKL; utils/diffusers_format.py converts the weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Attention, Downsample, ResBlock, Upsample, checkpointed, group_norm, num_norm_groups

MAX_PIXELS_PER_CHUNK = 2**20  # pixels processed at once without gradients: 4 images of 512x512, or 256 of 64x64


@dataclass
class Posterior:
    """Diagonal Gaussian q(z | x), (B, C, h, w) float32."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Sample mean + std · noise. `noise` is standard normal, and generated if None."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats per latent element, (B, C, h, w), not reduced."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar)


class VAE(nn.Module):
    """Images (B, in_channels, H, W) in [-1, 1] <-> latents (B, latent_channels, H/f, W/f).

    in_channels        channels of the images: 1 gray, 3 RGB, 4 RGBA
    channels           channels per level; the downsampling factor is f = patch_size · 2^(levels-1)
    num_res_blocks     residual blocks per level of the encoder; the decoder has one more per level
    attention          self-attention with one head in the bottleneck
    patch_size         fold patches of this size into channels, which makes the first level cheaper
    output_activation  activation after the decoder: tanh or none
    quant_conv         1x1 convolutions after the encoder and before the decoder, as in Stable Diffusion 1, 2 and XL
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        channels: list[int],
        num_res_blocks: int,
        latent_channels: int,
        attention: bool = False,
        patch_size: int = 1,
        output_activation: str = "none",
        quant_conv: bool = False,
    ):
        super().__init__()
        self.settings = dict(
            in_channels=in_channels,
            channels=list(channels),
            num_res_blocks=num_res_blocks,
            latent_channels=latent_channels,
            attention=attention,
            patch_size=patch_size,
            output_activation=output_activation,
            quant_conv=quant_conv,
        )
        self.downsampling = patch_size * 2 ** (len(channels) - 1)
        self.in_channels, self.latent_channels, self.output_activation = in_channels, latent_channels, output_activation
        self.grad_checkpointing = False  # recompute activations in the backward pass
        pixel_channels, groups = in_channels * patch_size**2, num_norm_groups(channels)

        ch = channels[0]
        layers: list[nn.Module] = [nn.PixelUnshuffle(patch_size), nn.Conv2d(pixel_channels, ch, 3, padding=1)]
        for level, level_channels in enumerate(channels):
            if level > 0:
                layers.append(Downsample(ch, symmetric_padding=False))
            for _ in range(num_res_blocks):
                layers.append(ResBlock(ch, level_channels, groups=groups))
                ch = level_channels
        layers += self._bottleneck(ch, attention, groups)
        layers += [group_norm(ch, groups), nn.SiLU(), nn.Conv2d(ch, 2 * latent_channels, 3, padding=1)]
        self.encoder = nn.Sequential(*layers)

        layers = [nn.Conv2d(latent_channels, ch, 3, padding=1), *self._bottleneck(ch, attention, groups)]
        for level, level_channels in reversed(list(enumerate(channels))):
            for _ in range(num_res_blocks + 1):
                layers.append(ResBlock(ch, level_channels, groups=groups))
                ch = level_channels
            if level > 0:
                layers.append(Upsample(ch))
        layers += [
            group_norm(ch, groups),
            nn.SiLU(),
            nn.Conv2d(ch, pixel_channels, 3, padding=1),
            nn.PixelShuffle(patch_size),
        ]
        self.decoder = nn.Sequential(*layers)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if quant_conv else nn.Identity()

    @staticmethod
    def _bottleneck(ch: int, attention: bool, groups: int) -> list[nn.Module]:
        attn = [Attention(ch, head_channels=ch, groups=groups)] if attention else []
        return [ResBlock(ch, ch, groups=groups), *attn, ResBlock(ch, ch, groups=groups)]

    @property
    def outer_layers(self) -> tuple[nn.Module, ...]:
        """Layers that read or write pixels or latents."""
        encoder, decoder = self.encoder, self.decoder
        return encoder[1], encoder[-1], self.quant_conv, self.post_quant_conv, decoder[0], decoder[-2]

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution."""
        return self.decoder[-2].weight

    def encode(self, images: Tensor) -> Posterior:
        """Images (B, C, H, W) in [-1, 1] -> q(z | x)."""
        height, width = images.shape[2:]
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"image height and width must be multiples of the downsampling factor {self.downsampling} "
                f"(got {height}x{width})"
            )
        moments = self._apply_in_chunks(self.encoder, images, height * width)
        mean, logvar = self.quant_conv(moments).float().chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))  # exp() stays finite in float32

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, C, h, w) -> float32 images (B, in_channels, H, W).

        Pixel values can lie outside [-1, 1] unless the output activation is tanh.
        """
        z = self.post_quant_conv(z)
        images = self._apply_in_chunks(self.decoder, z, z.shape[2] * z.shape[3] * self.downsampling**2)
        return torch.tanh(images) if self.output_activation == "tanh" else images

    def _apply_in_chunks(self, layers: nn.Sequential, x: Tensor, pixels_per_image: int) -> Tensor:
        """Apply layers and return float32. Without gradients, the batch is split to limit the memory."""
        chunks = [x] if torch.is_grad_enabled() else x.split(max(1, MAX_PIXELS_PER_CHUNK // pixels_per_image))

        def apply(h: Tensor) -> Tensor:
            if not self.grad_checkpointing:
                return layers(h)
            for layer in layers:
                h = checkpointed(layer, h)
            return h

        return torch.cat([apply(chunk).float() for chunk in chunks])

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Posterior]:
        """Return the reconstruction from one posterior sample, and the posterior."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(noise)), posterior


def reconstruction_error(kind: str, images: Tensor, reconstruction: Tensor) -> Tensor:
    """Squared ("mse") or absolute ("l1") error per pixel and channel, (B, C, H, W)."""
    return {"mse": F.mse_loss, "l1": F.l1_loss}[kind](reconstruction, images, reduction="none")
