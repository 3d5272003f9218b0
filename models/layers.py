"""Blocks shared by the VAE and the U-Net. Feature maps are (B, C, H, W)."""

import math
from typing import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.kernels import GroupNorm, scaled_dot_product_attention


def num_norm_groups(channels: list[int]) -> int:
    """Number of GroupNorm groups for a network with these channels per level.

    All layers have the same number of groups, as diffusers requires. It is the largest number up to 32 that divides the
    channels of every level and leaves at least 4 channels per group. Smaller groups would remove contrast between channels.
    """
    limit = min(32, max(1, min(channels) // 4))
    return max(groups for groups in range(1, limit + 1) if math.gcd(*channels) % groups == 0)


def height_width(size: int | Sequence[int]) -> list[int]:
    """Return [height, width] for a size that is one number (a square) or a pair."""
    return [size, size] if isinstance(size, int) else list(size)


def group_norm(channels: int, groups: int) -> GroupNorm:
    return GroupNorm(groups, channels, eps=1e-6)


def zero_init(module: nn.Module) -> nn.Module:
    """Zero all parameters, so that a residual block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def checkpointed(function, *args):
    """Call function(*args) with gradient checkpointing."""
    return checkpoint(function, *args, use_reentrant=False) if torch.is_grad_enabled() else function(*args)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of timesteps (B,) -> (B, dim), float32 (Vaswani et al. 2017, §3.5)."""
    frequencies = torch.exp(
        -math.log(max_period) / (dim // 2) * torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def num_heads(channels: int, head_channels: int) -> int:
    """Largest number of heads that divides channels and leaves at least head_channels channels per head, but at least 1."""
    heads = max(1, channels // head_channels)
    while channels % heads:
        heads -= 1
    return heads


class ResBlock(nn.Module):
    """Pre-activation residual block. If emb_dim > 0, emb (B, emb_dim) modulates it by AdaGN (Dhariwal & Nichol 2021, §3)."""

    def __init__(self, c_in: int, c_out: int, *, groups: int, emb_dim: int = 0, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in, groups), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(emb_dim, 2 * c_out) if emb_dim else None
        self.norm2, self.conv2 = group_norm(c_out, groups), zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.modulation is not None:
            scale, shift = self.modulation(F.silu(emb))[:, :, None, None].chunk(2, dim=1)  # (B, c_out, 1, 1) each
            h = h * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Residual self-attention over the H·W positions."""

    def __init__(self, channels: int, *, head_channels: int, groups: int):
        super().__init__()
        self.heads = num_heads(channels, head_channels)
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c)  # no copy if the norm returns channels_last
        qkv = self.qkv(tokens).view(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, H·W, c/heads) each
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return x + self.out(attended).view(b, h, w, c).permute(0, 3, 1, 2)


class CrossAttention(nn.Module):
    """Residual cross-attention, in which the H·W positions attend to tokens (Rombach et al. 2022, §3.3)."""

    def __init__(self, channels: int, token_dim: int, *, head_channels: int, groups: int):
        super().__init__()
        self.heads = num_heads(channels, head_channels)
        self.norm, self.norm_tokens = group_norm(channels, groups), nn.LayerNorm(token_dim)
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(token_dim, 2 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, L, token_dim); mask (B, L) bool, False for padding."""
        b, c, h, w = x.shape
        q = self.q(self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c))
        q = q.view(b, h * w, self.heads, -1).transpose(1, 2)  # (B, heads, H·W, c/heads)
        kv = self.kv(self.norm_tokens(tokens)).view(b, tokens.shape[1], 2, self.heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, heads, L, c/heads) each
        attended = scaled_dot_product_attention(q.to(v.dtype), k, v, mask)
        return x + self.out(attended.transpose(1, 2).reshape(b, h * w, c)).view(b, h, w, c).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Strided convolution. symmetric_padding=False pads only right and bottom, as diffusers' AutoencoderKL does."""

    def __init__(self, channels: int, symmetric_padding: bool = True):
        super().__init__()
        self.symmetric_padding = symmetric_padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric_padding else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.symmetric_padding else F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling and convolution, which avoids the checkerboard artifacts of transposed convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)
