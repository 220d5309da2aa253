"""The decoder recommender: item sequence in, one score per catalogue item out.

1. embed    item id embedding, plus a projection of the item's frozen text features when there are any
2. decode   pre-norm blocks under a causal mask that also keeps packed users apart
3. score    the final state against every item (tied or own table)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import Block, RMSNorm, rope_tables

__all__ = ["Recommender"]


class Recommender(nn.Module):
    """Scores the next item of a sequence.

    ``text_features`` is a frozen fp32 tensor [items, features] or None. It is a buffer that checkpoints
    leave out: it is a pure function of the data. Sequences of several users may share a row: ``segments``
    tells them apart.
    """

    text_features: Tensor | None

    def __init__(self, config: ModelConfig, num_items: int, text_features: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.num_items = num_items
        self.item_embedding = nn.Parameter(torch.empty(num_items, config.dim))
        self.register_buffer("text_features", text_features if config.text else None, persistent=False)
        if self.text_features is not None:
            self.text_projection = nn.Linear(self.text_features.shape[1], config.dim, bias=False)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = RMSNorm(config.dim)
        self.head = None if config.tied else nn.Parameter(torch.empty(num_items, config.dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights from the global torch generator; seed it first."""
        std = self.config.init_std
        nn.init.normal_(self.item_embedding, std=std)
        if self.head is not None:
            nn.init.normal_(self.head, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)

    def item_table(self) -> Tensor:
        """Input vectors of all items, [items, D]."""
        if self.text_features is None:
            return self.item_embedding
        return self.item_embedding + self.text_projection(self.text_features)

    def forward(self, items: Tensor, segments: Tensor, positions: Tensor, picks: Tensor) -> Tensor:
        """Scores of all items after the picked tokens.

        ``items``, ``segments``, ``positions`` are int64 [B, T]; tokens attend to earlier tokens of their
        own segment. ``picks`` is int64 [N], indices into the B * T tokens. Returns [N, items].
        """
        table = self.item_table()
        hidden = self.decode(nn.functional.embedding(items, table), segments, positions)
        hidden = self.final_norm(hidden.reshape(-1, self.config.dim)[picks])
        return hidden @ (table if self.head is None else self.head).T

    def decode(self, x: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
        """Runs the blocks: x [B, T, D] -> [B, T, D]."""
        tokens = segments.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=segments.device).tril()
        mask = ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]
        tables = rope_tables(positions, self.config.dim // self.config.heads, self.config.rope_base)
        x = self.embedding_dropout(x)
        for block in self.blocks:
            x = block(x, tables, mask)
        return x
