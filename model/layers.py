"""Layers of the decoder: RMSNorm, rotary positions, causal attention, SwiGLU, and the block that joins them.

Shapes: B rows, T tokens in a row, D = dim, H heads, C = D / H channels of a head.
Sources: RMSNorm arXiv 1910.07467, RoPE arXiv 2104.09864, SwiGLU arXiv 2002.05202, their union arXiv
2302.13971.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig

__all__ = ["Attention", "Block", "RMSNorm", "SwiGLU", "apply_rope", "rope_tables"]


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last dimension, then scales; [..., D] -> [..., D]."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_tables(positions: Tensor, channels: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles: positions [B, T] (int64) -> two tensors [B, 1, T, C / 2],
    fp32."""
    rates = base ** (-torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device) / channels)
    angles = positions[:, None, :, None].to(torch.float32) * rates
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channel pairs (i, i + C/2) by position-dependent angles; [B, H, T, C] -> the same shape.

    Dot products of turned queries and keys depend on the difference of their positions only.
    """
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Multi-head attention with rotary positions under a boolean mask."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """x [B, T, D], mask [B, 1, T, T] (True = may attend) -> [B, T, D]."""
        rows, tokens, dim = x.shape
        query, key, value = (
            part.view(rows, tokens, self.heads, dim // self.heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(
            apply_rope(query, tables),
            apply_rope(key, tables),
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(mixed.transpose(1, 2).reshape(rows, tokens, dim))


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x)); [..., D] -> [..., D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm decoder block: attention, then the feed-forward layer, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.dim)
        self.feed_forward = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), tables, mask))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
