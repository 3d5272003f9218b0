"""The noise-prediction U-Net (Ronneberger et al. 2015; Ho et al. 2020, App. B; Dhariwal & Nichol 2021)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.conditioning import Raw, make_conditioner
from models.layers import (
    Attention,
    CrossAttention,
    Downsample,
    ResBlock,
    Upsample,
    norm,
    recomputed,
    timestep_embedding,
    zero,
)
from models.transformer import TransformerBottleneck


class UNet(nn.Module):
    """z_t (B, C, h, w), timesteps t (B,) and, where it has a conditioner, a raw condition -> prediction (B, C, h, w), float32.

    widths[i] are the channels at level i, where the latent is `size` / 2^i wide. After every residual block there is
    self-attention where that width is in `attention`, and cross-attention to the condition's tokens where it is in
    `cross_attention`. The middle is two residual blocks around self-attention, or a transformer on the positions.
    `conditioning` is what `make_conditioner` takes. Raises ValueError for settings that do not fit together.
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
        conditioning: dict | None = None,
        cross_attention: list[int] = (),
        bottleneck: str = "residual",
        bottleneck_blocks: int = 4,
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
            conditioning=conditioning,
            cross_attention=list(cross_attention),
            bottleneck=bottleneck,
            bottleneck_blocks=bottleneck_blocks,
        )
        if size % 2 ** (len(widths) - 1):
            raise ValueError(f"latents of {size}x{size} cannot be halved {len(widths) - 1} times")
        emb_dim = 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.conditioner = make_conditioner(conditioning, emb_dim) if conditioning else None
        token_dim = self.conditioner.token_dim if self.conditioner else None
        sizes = [size >> level for level in range(len(widths))]
        if token_dim and not set(cross_attention) & set(sizes):
            raise ValueError(
                f"cross_attention {list(cross_attention)} names none of the latent's widths in the U-Net, {', '.join(map(str, sizes))}"
            )
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)

        def across(width: int, resolution: int) -> list[nn.Module]:
            return [CrossAttention(width, token_dim, head_channels)] if token_dim and resolution in cross_attention else []

        def block(c_in: int, c_out: int, resolution: int) -> nn.ModuleList:
            modules: list[nn.Module] = [ResBlock(c_in, c_out, emb_dim, dropout)]
            if resolution in attention:
                modules.append(Attention(c_out, head_channels))
            return nn.ModuleList(modules + across(c_out, resolution))

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

        if bottleneck == "transformer":
            middle = [TransformerBottleneck(width, sizes[-1], bottleneck_blocks, head_channels, emb_dim)]
            middle += across(width, sizes[-1])
        elif bottleneck == "residual":
            middle = [ResBlock(width, width, emb_dim, dropout), Attention(width, head_channels), *across(width, sizes[-1])]
            middle += [ResBlock(width, width, emb_dim, dropout)]
        else:
            raise ValueError(f"bottleneck {bottleneck!r} does not exist; there are: residual, transformer")
        self.middle = nn.ModuleList(middle)

        self.up = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                modules = block(width + kept.pop(), level_width, size >> level)
                width = level_width
                if level > 0 and i == blocks:
                    modules.append(Upsample(width, width))
                self.up.append(modules)

        self.checkpointing = False  # recompute activations in the backward pass
        self.norm_out, self.conv_out = norm(width), zero(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, z_t: Tensor, t: Tensor, raw: Raw | None = None) -> Tensor:
        emb = self.time(timestep_embedding(t, self.time[0].in_features))  # (B, emb_dim)
        tokens = mask = None
        if self.conditioner is not None:
            condition = self.conditioner(*raw)
            emb, tokens, mask = emb + condition.emb, condition.tokens, condition.mask

        def through(modules: nn.ModuleList, h: Tensor) -> Tensor:
            inputs = modules, h, emb, tokens, mask
            return recomputed(in_order, *inputs) if self.checkpointing else in_order(*inputs)

        h = self.conv_in(z_t)
        skips = [h]
        for modules in self.down:
            h = through(modules, h)
            skips.append(h)
        h = through(self.middle, h)
        for modules in self.up:
            h = through(modules, torch.cat([h, skips.pop()], dim=1))
        return self.conv_out(F.silu(self.norm_out(h))).float()


def in_order(modules: nn.ModuleList, h: Tensor, emb: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
    """Apply modules in order, each with what it needs beside the map."""
    for module in modules:
        if isinstance(module, (ResBlock, TransformerBottleneck)):
            h = module(h, emb)
        elif isinstance(module, CrossAttention):
            h = module(h, tokens, mask)
        else:
            h = module(h)
    return h
