"""Transformer blocks on tokens (B, N, C), for the caption encoder and the U-Net's bottleneck."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.kernels import scaled_dot_product_attention
from models.layers import group_norm, num_heads, zero_init


class TokenAttention(nn.Module):
    """Multi-head self-attention. qk_norm applies RMSNorm to q and k (Dehghani et al. 2023, §2)."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask (B, N) bool: True for tokens to attend to."""
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, C/heads) each
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        attended = scaled_dot_product_attention(q, k, v, mask)
        return self.out(attended.transpose(1, 2).reshape(b, n, c))


def mlp(width: int) -> nn.Sequential:
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
    """Transformer block modulated by an embedding (B, emb_dim) (Peebles & Xie 2023, §3.2). Initialized as the identity."""

    def __init__(self, width: int, heads: int, emb_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention, self.mlp = TokenAttention(width, heads, qk_norm=True), mlp(width)
        self.modulation = zero_init(nn.Linear(emb_dim, 6 * width))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        modulation = self.modulation(F.silu(emb))[:, None]  # (B, 1, 6C)
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.chunk(6, dim=2)  # (B, 1, C) each
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class TransformerBottleneck(nn.Module):
    """Residual adaLN-Zero transformer on the H·W positions of a feature map.

    The position embeddings are learned for size = (height, width) and interpolated to other sizes.
    """

    def __init__(self, *, channels: int, size: list[int], num_blocks: int, head_channels: int, emb_dim: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.positions = nn.Parameter(0.02 * torch.randn(1, channels, *size))
        heads = num_heads(channels, head_channels)
        self.blocks = nn.ModuleList(AdaLNZeroBlock(channels, heads, emb_dim) for _ in range(num_blocks))
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        b, c, h, w = x.shape
        positions = self.positions
        if positions.shape[2:] != (h, w):
            positions = F.interpolate(positions, (h, w), mode="bicubic", align_corners=False)
        tokens = (self.norm(x) + positions).permute(0, 2, 3, 1).reshape(b, h * w, c)
        for block in self.blocks:
            tokens = block(tokens, emb)
        return x + self.out(tokens).view(b, h, w, c).permute(0, 3, 1, 2)
