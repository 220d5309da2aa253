"""The recommender in torch's own layers, as one writes it without us; weights are copied from ours.

Scores are one table, N x V, and `torch.nn.functional.cross_entropy` goes over it. The mask is made once and not in each
forward, as ours is, and rotary tables are not looked up by position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.parallel.case import TOKENS, Case
from model.layers import apply_rope, rope_tables
from model.recommender import Recommender

__all__ = ["Block", "Embedding", "Head", "Hidden", "layers", "regroup"]


def regroup(weight: Tensor, sections: int, shares: int) -> Tensor:
    """Rows [sections * n, ...] in an order in which share r of all rows has share r of each section."""
    shape = weight.shape
    parts = weight.reshape(sections, shares, -1, shape[-1]).transpose(0, 1)
    return parts.reshape(shape).contiguous()


class Embedding(nn.Module):
    """Item ids [B, T] -> [B, T, D]."""

    def __init__(self, whole: Recommender) -> None:
        super().__init__()
        weight = whole.table.embedding.detach()
        self.items = nn.Embedding(*weight.shape)
        self.items.weight = nn.Parameter(weight.clone())

    def forward(self, items: Tensor) -> Tensor:
        return self.items(items)


class Block(nn.Module):
    """A decoder block, with its share of ``shares`` of the heads and hidden channels once it is parallelised."""

    def __init__(self, whole: Recommender, layer: int, *, shares: int = 1) -> None:
        super().__init__()
        config, ours = whole.config, whole.blocks[str(layer)]
        dim, hidden = config.dim, config.hidden
        self.heads, self.channels = config.heads // shares, dim // config.heads
        self.attention_norm, self.feed_forward_norm = (nn.RMSNorm(dim, eps=1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate_up, self.down = (
            nn.Linear(dim, 2 * hidden, bias=False),
            nn.Linear(hidden, dim, bias=False),
        )
        with torch.no_grad():
            self.qkv.weight.copy_(regroup(ours.attention.qkv.weight, 3, shares))
            self.out.weight.copy_(ours.attention.out.weight)
            self.gate_up.weight.copy_(regroup(ours.feed_forward.gate_up.weight, 2, shares))
            self.down.weight.copy_(ours.feed_forward.down.weight)
        cos, sin = rope_tables(torch.arange(TOKENS)[None], self.channels, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("mask", torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens = x.shape[:2]
        qkv = self.qkv(self.attention_norm(x)).view(rows, tokens, 3, self.heads, self.channels)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        query, key = apply_rope(query, (self.cos, self.sin)), apply_rope(key, (self.cos, self.sin))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, tokens, self.heads * self.channels))
        gate, up = self.gate_up(self.feed_forward_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Hidden(nn.Module):
    """The final norm alone, [B, T, D] -> [N, D]; it holds the items' table for a loss that scores them itself."""

    def __init__(self, whole: Recommender) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(whole.config.dim, eps=1e-6)
        self.table = nn.Parameter(whole.head.embedding.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).flatten(0, 1)


class Head(nn.Module):
    """The final norm and the scores of all items, [B, T, D] -> [N, V]."""

    def __init__(self, whole: Recommender) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(whole.config.dim, eps=1e-6)
        self.scores = nn.Linear(whole.config.dim, whole.num_items, bias=False)
        self.scores.weight = nn.Parameter(whole.head.embedding.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.norm(x).flatten(0, 1))


def layers(case: Case, *, tiles: bool = False, shares: int = 1) -> list[nn.Module]:
    """Embedding, blocks and head; with ``tiles`` a head whose loss is `model.vocab.item_loss`."""
    whole = case.whole()
    blocks = [Block(whole, layer, shares=shares) for layer in range(case.layers)]
    return [Embedding(whole), *blocks, Hidden(whole) if tiles else Head(whole)]
