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
from model.dropout import AttentionDropout, Dropout
from model.linear import ColumnLinear, RowLinear
from model.tensor_parallel import ALONE, TensorParallel

__all__ = ["Attention", "Block", "RMSNorm", "RotaryTables", "SwiGLU", "apply_rope", "rope_tables"]


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last dimension, then scales; [..., D] -> [..., D]."""

    def __init__(self, dim: int, eps: float = 1e-6, *, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.partial = {"weight"} if tp.sequence else set()
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


class RotaryTables(nn.Module):
    """`rope_tables` of all positions below ``max_len``, made once. Checkpoints leave them out."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        every = rope_tables(torch.arange(config.max_len)[None], config.dim // config.heads, config.rope_base)
        for name, table in zip(("cos", "sin"), every, strict=True):
            self.register_buffer(name, table[0, 0].contiguous(), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [B, T] below ``max_len`` -> two tensors [B, 1, T, C / 2] (IndexError past it, on a host)."""
        rows, tokens = positions.shape
        flat = positions.reshape(-1)
        cos, sin = (table.index_select(0, flat).view(rows, 1, tokens, -1) for table in (self.cos, self.sin))
        return cos, sin


def apply_rope(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channel pairs (i, i + C/2) by position-dependent angles; [B, H, T, C] -> the same shape.

    Dot products of turned queries and keys depend on the difference of their positions only.
    """
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Multi-head attention with rotary positions under a boolean mask; the ranks of ``tp`` share the heads.

    A rank without heads (more ranks than heads) takes part in the collectives and adds nothing.
    """

    def __init__(self, config: ModelConfig, *, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.tp = tp
        self.channels = config.dim // config.heads
        heads = tp.sizes(config.heads)
        self.heads = heads[tp.rank]
        sizes = tuple(self.channels * each for each in heads)
        self.qkv = ColumnLinear(config.dim, 3 * config.dim, tp=tp, sizes=sizes, sections=3)
        first = sum(heads[: tp.rank])
        self.dropout = AttentionDropout(
            config.dropout, place=0, heads=range(first, first + self.heads), tp=tp
        )
        self.out = RowLinear(config.dim, config.dim, tp=tp, sizes=sizes)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor, draws: Tensor | None = None
    ) -> Tensor:
        """x [B, T, D], mask [B, 1, T, T] (True = may attend) -> [B, T, D]; tokens [n, D] of the B * T where
        ranks split them. ``draws`` [B, T] are dropout's."""
        rows, tokens = mask.shape[0], mask.shape[-1]
        qkv = self.qkv(x, rows * tokens).view(rows, tokens, 3, self.heads, self.channels)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        query, key = apply_rope(query, tables), apply_rope(key, tables)
        if self.dropout.active:
            weights = (query * self.channels**-0.5) @ key.transpose(-2, -1)
            weights = weights.masked_fill(~mask, -torch.inf).softmax(-1)
            mixed = self.dropout(weights, draws) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        shape = (rows * tokens,) if self.tp.sequence else (rows, tokens)
        return self.out(mixed.transpose(1, 2).reshape(*shape, self.heads * self.channels), rows * tokens)


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x)); [..., D] -> [..., D]. The ranks of ``tp`` share the
    hidden channels."""

    def __init__(self, config: ModelConfig, *, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.gate_up = ColumnLinear(config.dim, 2 * config.hidden, tp=tp, sections=2)
        self.down = RowLinear(config.hidden, config.dim, tp=tp)

    def forward(self, x: Tensor, tokens: int = 0) -> Tensor:
        """``tokens`` of all ranks, where they split them."""
        gate, up = self.gate_up(x, tokens).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up, tokens)


class Block(nn.Module):
    """Pre-norm decoder block: attention, then the feed-forward layer, each added to the residual stream.

    Under sequence parallelism the stream between the layers holds this rank's tokens: [n, D] of B * T.
    """

    def __init__(self, config: ModelConfig, *, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, tp=tp)
        self.attention = Attention(config, tp=tp)
        self.feed_forward_norm = RMSNorm(config.dim, tp=tp)
        self.feed_forward = SwiGLU(config, tp=tp)
        self.attention_dropout = Dropout(config.dropout, place=2, channels=config.dim, tp=tp)
        self.feed_forward_dropout = Dropout(config.dropout, place=3, channels=config.dim, tp=tp)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor, draws: Tensor | None = None
    ) -> Tensor:
        """``draws`` int64 [B, T]: what dropout makes masks of; may be missing where nothing is dropped."""
        attended = self.attention(self.attention_norm(x), tables, mask, draws)
        x = x + self.attention_dropout(attended, draws)
        tokens = mask.shape[0] * mask.shape[-1]
        return x + self.feed_forward_dropout(self.feed_forward(self.feed_forward_norm(x), tokens), draws)
