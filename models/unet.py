"""U-Net that predicts eps, v, x0 or velocity (Ronneberger et al. 2015; Ho et al. 2020, App. B; Dhariwal & Nichol 2021)."""

from typing import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.conditioning import Cond, make_conditioner
from models.layers import (
    Attention,
    CrossAttention,
    Downsample,
    ResBlock,
    Upsample,
    checkpointed,
    group_norm,
    height_width,
    num_norm_groups,
    timestep_embedding,
    zero_init,
)
from models.transformer import TransformerBottleneck


class UNet(nn.Module):
    """z_t (B, in_channels, h, w), timesteps (B,) and a condition -> prediction in the shape of z_t, float32.

    size                    height and width of the training latents; one number for a square
    channels                channels per level
    num_res_blocks          residual blocks per level in the downsampling path; the upsampling path has one more per level
    attn_resolutions        resolutions with self-attention after each residual block; the resolution of level i is
                            the longer side of its feature maps, max(size) / 2^i
    head_channels           minimum channels per attention head
    conditioning            arguments of `make_conditioner`; None: unconditional
    cross_attn_resolutions  resolutions with cross-attention to the condition's tokens
    bottleneck              residual: two residual blocks around self-attention; transformer: TransformerBottleneck
    bottleneck_blocks       blocks of the transformer bottleneck
    """

    def __init__(
        self,
        *,
        in_channels: int,
        size: int | Sequence[int],
        channels: list[int],
        num_res_blocks: int,
        attn_resolutions: list[int],
        head_channels: int = 64,
        dropout: float = 0.0,
        conditioning: dict | None = None,
        cross_attn_resolutions: list[int] = (),
        bottleneck: str = "residual",
        bottleneck_blocks: int = 4,
    ):
        super().__init__()
        self.settings = dict(
            in_channels=in_channels,
            size=height_width(size),
            channels=list(channels),
            num_res_blocks=num_res_blocks,
            attn_resolutions=list(attn_resolutions),
            head_channels=head_channels,
            dropout=dropout,
            conditioning=conditioning,
            cross_attn_resolutions=list(cross_attn_resolutions),
            bottleneck=bottleneck,
            bottleneck_blocks=bottleneck_blocks,
        )
        self.grad_checkpointing = False  # recompute activations in the backward pass
        (height, width), num_levels = height_width(size), len(channels)
        if height % 2 ** (num_levels - 1) or width % 2 ** (num_levels - 1):
            raise ValueError(
                f"latents of {height}x{width} cannot be halved {num_levels - 1} times: use fewer levels in channels"
            )
        resolutions = self.resolutions

        self.emb_dim, self.groups = 4 * channels[0], num_norm_groups(channels)
        self.time_embed = nn.Sequential(
            nn.Linear(channels[0], self.emb_dim), nn.SiLU(), nn.Linear(self.emb_dim, self.emb_dim)
        )
        self.conditioner = make_conditioner(conditioning, self.emb_dim) if conditioning else None
        self.token_dim = self.conditioner.token_dim if self.conditioner else None
        if self.token_dim and not set(cross_attn_resolutions) & set(resolutions):
            raise ValueError(
                f"cross_attn_resolutions must include a resolution of the U-Net, {', '.join(map(str, resolutions))} "
                f"(got {list(cross_attn_resolutions)})"
            )

        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        ch, skip_channels = channels[0], [channels[0]]
        self.down = nn.ModuleList()
        for level, level_channels in enumerate(channels):
            if level > 0:
                self.down.append(nn.ModuleList([Downsample(ch)]))
                skip_channels.append(ch)
            for _ in range(num_res_blocks):
                self.down.append(self._block(ch, level_channels, resolutions[level]))
                ch = level_channels
                skip_channels.append(ch)

        self.middle = self._bottleneck(ch, resolutions[-1])

        self.up = nn.ModuleList()
        for level, level_channels in reversed(list(enumerate(channels))):
            for i in range(num_res_blocks + 1):
                block = self._block(ch + skip_channels.pop(), level_channels, resolutions[level])
                ch = level_channels
                if level > 0 and i == num_res_blocks:
                    block.append(Upsample(ch))
                self.up.append(block)
        self.norm_out, self.conv_out = group_norm(ch, self.groups), zero_init(nn.Conv2d(ch, in_channels, 3, padding=1))

    @property
    def resolutions(self) -> list[int]:
        """Longer side of the feature maps of each level."""
        return [max(self.settings["size"]) >> level for level in range(len(self.settings["channels"]))]

    @property
    def outer_layers(self) -> tuple[nn.Module, ...]:
        """Layers that read latents, timesteps or conditions, or write latents."""
        modulations = [m.modulation for m in self.modules() if getattr(m, "modulation", None) is not None]
        conditioner = self.conditioner.modules() if self.conditioner else ()
        return (self.conv_in, self.conv_out, *self.time_embed, *modulations, *conditioner)

    def _res_block(self, c_in: int, c_out: int) -> ResBlock:
        return ResBlock(c_in, c_out, groups=self.groups, emb_dim=self.emb_dim, dropout=self.settings["dropout"])

    def _attention(self, ch: int) -> Attention:
        return Attention(ch, head_channels=self.settings["head_channels"], groups=self.groups)

    def _block(self, c_in: int, c_out: int, resolution: int) -> nn.ModuleList:
        modules: list[nn.Module] = [self._res_block(c_in, c_out)]
        if resolution in self.settings["attn_resolutions"]:
            modules.append(self._attention(c_out))
        return nn.ModuleList(modules + self._cross_attn(c_out, resolution))

    def _cross_attn(self, ch: int, resolution: int) -> list[nn.Module]:
        if not self.token_dim or resolution not in self.settings["cross_attn_resolutions"]:
            return []
        return [CrossAttention(ch, self.token_dim, head_channels=self.settings["head_channels"], groups=self.groups)]

    def _bottleneck(self, ch: int, resolution: int) -> nn.ModuleList:
        kind = self.settings["bottleneck"]
        if kind == "residual":
            modules = [self._res_block(ch, ch), self._attention(ch)]
            modules += [*self._cross_attn(ch, resolution), self._res_block(ch, ch)]
        elif kind == "transformer":
            transformer = TransformerBottleneck(
                channels=ch,
                size=[side >> len(self.settings["channels"]) - 1 for side in self.settings["size"]],
                num_blocks=self.settings["bottleneck_blocks"],
                head_channels=self.settings["head_channels"],
                emb_dim=self.emb_dim,
                groups=self.groups,
            )
            modules = [transformer, *self._cross_attn(ch, resolution)]
        else:
            raise ValueError(f"bottleneck must be residual or transformer (got {kind!r})")
        return nn.ModuleList(modules)

    def forward(self, z_t: Tensor, t: Tensor, cond: Cond = ()) -> Tensor:
        emb = self.time_embed(timestep_embedding(t, self.time_embed[0].in_features))  # (B, emb_dim)
        tokens = mask = None
        if self.conditioner is not None:
            condition = self.conditioner(*cond)
            emb, tokens, mask = emb + condition.emb, condition.tokens, condition.mask

        def apply(block: nn.ModuleList, h: Tensor) -> Tensor:
            inputs = block, h, emb, tokens, mask
            return checkpointed(run_block, *inputs) if self.grad_checkpointing else run_block(*inputs)

        h = self.conv_in(z_t)
        skips = [h]
        for block in self.down:
            h = apply(block, h)
            skips.append(h)
        h = apply(self.middle, h)
        for block in self.up:
            h = apply(block, torch.cat([h, skips.pop()], dim=1))
        return self.conv_out(F.silu(self.norm_out(h))).float()


def run_block(block: nn.ModuleList, h: Tensor, emb: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
    """Apply the modules of a block in order. Each gets the inputs that its type takes."""
    for module in block:
        if isinstance(module, (ResBlock, TransformerBottleneck)):
            h = module(h, emb)
        elif isinstance(module, CrossAttention):
            h = module(h, tokens, mask)
        else:
            h = module(h)
    return h
