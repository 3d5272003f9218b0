"""Blocks that the VAE and the U-Net share. Tensors are (B, C, H, W)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

FEW_TOKENS = 256


class GroupNorm(nn.GroupNorm):
    """GroupNorm with statistics in its weights' type (float32), its output in the input's type.

    PyTorch's own bf16 kernel for channels_last on CPUs is so slow that this makes a VAE's training step 1.4 times faster. Its CUDA kernel
    knows no channels_last at all: there the layout changes with the type, in the same two copies.
    """

    def forward(self, x: Tensor) -> Tensor:
        eager = x.is_cuda and not torch.compiler.is_compiling()
        inside, outside = (torch.contiguous_format, torch.channels_last) if eager else (torch.preserve_format,) * 2
        x32 = x.to(self.weight.dtype, memory_format=inside)
        return F.group_norm(x32, self.num_groups, self.weight, self.bias, self.eps).to(x.dtype, memory_format=outside)


def norm(channels: int) -> GroupNorm:
    """GroupNorm with up to 32 groups of at least 4 channels: groups of one or two lose contrast between channels."""
    groups = min(32, max(1, channels // 4))
    while channels % groups:
        groups -= 1
    return GroupNorm(groups, channels, eps=1e-6)


def zero(module: nn.Module) -> nn.Module:
    """Start a layer at zero, so that the block it ends begins as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def recomputed(function, *arguments):
    """function(*arguments), whose activations are not kept for the backward pass but computed anew there (Chen et al. 2016)."""
    return checkpoint(function, *arguments, use_reentrant=False) if torch.is_grad_enabled() else function(*arguments)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of timesteps (B,) -> (B, dim), float32 (Vaswani et al. 2017, §3.5; Ho et al. 2020, App. B)."""
    frequencies = torch.exp(
        -math.log(max_period) / (dim // 2) * torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def heads_of(channels: int, head_channels: int) -> int:
    """As many heads of at least head_channels as divide the channels evenly."""
    heads = max(1, channels // head_channels)
    while channels % heads:
        heads -= 1
    return heads


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, all (B, heads, N, d); `mask` (B, L) bool: true for keys that may be attended to.

    Few bf16 tokens on a CPU go by plain products: PyTorch's fused kernel takes three times as long there (64 tokens, both passes).
    """
    mask = None if mask is None else mask[:, None, None, :]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.shape[2] > FEW_TOKENS:
        return F.scaled_dot_product_attention(q, k, v, mask)
    logits = q * q.shape[3] ** -0.5 @ k.transpose(2, 3)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return torch.softmax(logits, dim=3).to(v.dtype) @ v


class ResBlock(nn.Module):
    """Pre-activation residual block; with `emb_dim` its second norm is scaled and shifted by an embedding (B, emb_dim).

    The adaptive norm is Dhariwal & Nichol 2021, §3 (AdaGN); the second convolution starts at zero.
    """

    def __init__(self, c_in: int, c_out: int, emb_dim: int = 0, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * c_out) if emb_dim else None
        self.norm2, self.conv2 = norm(c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        h = self.norm2(h)
        if self.emb is not None:
            scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)  # (B, c_out, 1, 1) each
            h = h * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Self-attention over the H·W positions, residual, its projection starting at zero; heads of at least head_channels."""

    def __init__(self, channels: int, head_channels: int = 64):
        super().__init__()
        self.heads = heads_of(channels, head_channels)
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c)  # on CPUs no copy where x is channels_last
        qkv = self.qkv(tokens).view(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, H·W, c/heads) each
        attended = attend(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return x + self.out(attended).view(b, h, w, c).permute(0, 3, 1, 2)


class CrossAttention(nn.Module):
    """Every position attends to tokens (B, L, token_dim), padding left out by mask (B, L); residual, its projection starting at
    zero (Rombach et al. 2022, §3.3)."""

    def __init__(self, channels: int, token_dim: int, head_channels: int = 64):
        super().__init__()
        self.heads = heads_of(channels, head_channels)
        self.norm, self.norm_tokens = norm(channels), nn.LayerNorm(token_dim)
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(token_dim, 2 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q = self.q(self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c))
        q = q.view(b, h * w, self.heads, -1).transpose(1, 2)  # (B, heads, H·W, c/heads)
        kv = self.kv(self.norm_tokens(tokens)).view(b, tokens.shape[1], 2, self.heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, heads, L, c/heads) each
        attended = attend(q.to(v.dtype), k, v, mask)
        return x + self.out(attended.transpose(1, 2).reshape(b, h * w, c)).view(b, h, w, c).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halve height and width with a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution (no checkerboard, unlike a transposed one)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, c_out, 2H, 2W)
