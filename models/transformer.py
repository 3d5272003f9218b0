"""Transformer blocks on tokens (B, N, C): the caption encoder's, and the U-Net's transformer bottleneck."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import attend, heads_of, norm, zero


class TokenAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017); with qk_norm queries and keys have unit RMS (Dehghani et al. 2023, §2)."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask (B, N) bool: true where a token may be attended to."""
        b, n, c = x.shape
        q, k, v = (
            self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        )  # (B, heads, N, C/heads) each
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        attended = attend(q, k, v, mask)
        return self.out(attended.transpose(1, 2).reshape(b, n, c))


def mlp(width: int) -> nn.Sequential:
    """Two layers, four times as wide inside."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class EncoderBlock(nn.Module):
    """Pre-norm transformer block (Xiong et al. 2020)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), TokenAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), mlp(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class AdaLNZeroBlock(nn.Module):
    """Transformer block whose norms are scaled, shifted and gated by an embedding (B, emb_dim); the gates start at zero,
    and so the block is the identity at first (Peebles & Xie 2023, §3.2, adaLN-Zero)."""

    def __init__(self, width: int, heads: int, emb_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention, self.mlp = TokenAttention(width, heads, qk_norm=True), mlp(width)
        self.modulation = zero(nn.Linear(emb_dim, 6 * width))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(F.silu(emb))[:, None].chunk(
            6, dim=2
        )  # (B, 1, C) each
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class TransformerBottleneck(nn.Module):
    """A map (B, C, H, W) as H·W tokens with learned positions, through adaLN-Zero blocks, and back; residual as a whole.

    The positions are learned for size×size maps and interpolated to others.
    """

    def __init__(self, channels: int, size: int, blocks: int, head_channels: int, emb_dim: int):
        super().__init__()
        self.norm = norm(channels)
        self.positions = nn.Parameter(0.02 * torch.randn(1, channels, size, size))
        heads = heads_of(channels, head_channels)
        self.blocks = nn.ModuleList(AdaLNZeroBlock(channels, heads, emb_dim) for _ in range(blocks))
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        b, c, h, w = x.shape
        positions = self.positions
        if positions.shape[2:] != (h, w):
            positions = F.interpolate(positions, (h, w), mode="bicubic", align_corners=False)
        tokens = (self.norm(x) + positions).permute(0, 2, 3, 1).reshape(b, h * w, c)
        for block in self.blocks:
            tokens = block(tokens, emb)
        return x + self.out(tokens).view(b, h, w, c).permute(0, 3, 1, 2)
