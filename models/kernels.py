"""Replacements for PyTorch kernels that are slow on some hardware."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_UNFUSED_TOKENS = 256  # bf16 attention on CPUs uses plain matrix products for at most this many keys


class GroupNorm(nn.GroupNorm):
    """GroupNorm that computes in the dtype of its weights (float32) and returns the dtype of its input.

    On CPUs, the VAE training step is 1.4 times faster than with PyTorch's bf16 channels_last kernel. In eager mode on CUDA,
    the input is also converted to contiguous format and the output to channels_last, because PyTorch's kernel does not
    support channels_last.
    """

    def forward(self, x: Tensor) -> Tensor:
        eager_cuda = x.is_cuda and not torch.compiler.is_compiling()
        in_format = torch.contiguous_format if eager_cuda else torch.preserve_format
        out_format = torch.channels_last if eager_cuda else torch.preserve_format
        x32 = x.to(self.weight.dtype, memory_format=in_format)
        return F.group_norm(x32, self.num_groups, self.weight, self.bias, self.eps).to(x.dtype, memory_format=out_format)


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q (B, heads, N, d), k and v (B, heads, L, d). mask (B, L) bool: keys to attend to.

    On CPUs, two separate matrix products are 3 times as fast as the fused kernel for 64 tokens in bf16.
    """
    mask = None if mask is None else mask[:, None, None, :]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.shape[2] > MAX_UNFUSED_TOKENS:
        return F.scaled_dot_product_attention(q, k, v, mask)
    logits = q * q.shape[3] ** -0.5 @ k.transpose(2, 3)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return torch.softmax(logits, dim=3).to(v.dtype) @ v
