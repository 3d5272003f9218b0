"""The noise-prediction U-Net (Ronneberger et al. 2015; Ho et al. 2020, App. B; Dhariwal & Nichol 2021)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import (
    Attention,
    Downsample,
    ResBlock,
    Upsample,
    norm,
    timestep_embedding,
    zero,
)


class UNet(nn.Module):
    """z_t (B, C, h, w) and timesteps t (B,) -> prediction (B, C, h, w), float32.

    widths[i] are the channels at level i, where the latent is `size` / 2^i wide; levels whose width is in `attention`
    have self-attention after every residual block. Raises ValueError if `size` cannot be halved that often.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        widths: list[int],
        blocks: int,
        attention: list[int],
        head_channels: int = 64,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.settings = dict(
            channels=channels,
            size=size,
            widths=list(widths),
            blocks=blocks,
            attention=list(attention),
            head_channels=head_channels,
            dropout=dropout,
        )
        if size % 2 ** (len(widths) - 1):
            raise ValueError(f"latents of {size}x{size} cannot be halved {len(widths) - 1} times")
        emb_dim = 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)

        def block(c_in: int, c_out: int, resolution: int) -> nn.ModuleList:
            modules: list[nn.Module] = [ResBlock(c_in, c_out, emb_dim, dropout)]
            if resolution in attention:
                modules.append(Attention(c_out, head_channels))
            return nn.ModuleList(modules)

        # Every output of the way down is kept and joined, last first, on the way up.
        self.down, kept, width = nn.ModuleList(), [widths[0]], widths[0]
        for level, level_width in enumerate(widths):
            if level > 0:
                self.down.append(nn.ModuleList([Downsample(width)]))
                kept.append(width)
            for _ in range(blocks):
                self.down.append(block(width, level_width, size >> level))
                width = level_width
                kept.append(width)

        self.middle = nn.ModuleList(
            [
                ResBlock(width, width, emb_dim, dropout),
                Attention(width, head_channels),
                ResBlock(width, width, emb_dim, dropout),
            ]
        )

        self.up = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                modules = block(width + kept.pop(), level_width, size >> level)
                width = level_width
                if level > 0 and i == blocks:
                    modules.append(Upsample(width, width))
                self.up.append(modules)

        self.norm_out, self.conv_out = norm(width), zero(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        emb = self.time(timestep_embedding(t, self.time[0].in_features))  # (B, emb_dim)
        h = self.conv_in(z_t)
        skips = [h]
        for modules in self.down:
            h = run(modules, h, emb)
            skips.append(h)
        h = run(self.middle, h, emb)
        for modules in self.up:
            h = run(modules, torch.cat([h, skips.pop()], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h))).float()


def run(modules: nn.ModuleList, h: Tensor, emb: Tensor) -> Tensor:
    """Apply modules in order; residual blocks are given the embedding too."""
    for module in modules:
        h = module(h, emb) if isinstance(module, ResBlock) else module(h)
    return h
