"""What tests of tensor parallelism share: a decoder of parallel layers, ranks, and what rounding may do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hybridcomm.context import Context
from model.config import ModelConfig
from model.dropout import Dropout, derive_draws
from model.layers import Block, RMSNorm, rope_tables
from model.linear import Linear
from model.sharding import draw_whole
from model.tensor_parallel import ALONE, GATHER, TensorParallel, through
from model.vocab import ItemTable, embed, item_loss
from tests.numerics import gamma
from tests.ranks import run_ranks
from train.batch import Packed, pack

ITEMS = 37
FEATURES = 5
CONFIG = ModelConfig(dim=24, layers=2, heads=6, hidden=19, max_len=12, dropout=0.0, init_std=0.3)
"""6 heads, 19 hidden channels and 37 items: nothing that 2 or 4 divide both ways."""
FEW_HEADS = CONFIG.model_copy(update={"heads": 3, "hidden": 3, "tied": False})
"""Fewer heads and channels than ranks; items are scored by a table of their own."""


class Decoder(nn.Module):
    """The recommender's shape from parallel parts; ``loss`` is the sum over a batch's predictions."""

    def __init__(self, config: ModelConfig, tp: TensorParallel = ALONE, *, text: bool = True) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        features = torch.randn(ITEMS, FEATURES, generator=torch.Generator().manual_seed(8))
        self.table = ItemTable(ITEMS, config.dim, features=features if text else None, tp=tp)
        self.head = None if config.tied else ItemTable(ITEMS, config.dim, tp=tp)
        self.embedding_dropout = Dropout(config.dropout, place=0, channels=config.dim, tp=tp)
        self.blocks = nn.ModuleList(Block(config, tp=tp) for _ in range(config.layers))
        self.final_norm = RMSNorm(config.dim, tp=tp)

    def hidden(self, batch: Packed, table: Tensor) -> Tensor:
        rows, tokens = batch.items.shape
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        mask = ((batch.segments[:, :, None] == batch.segments[:, None, :]) & causal)[:, None]
        tables = rope_tables(batch.positions, self.config.dim // self.config.heads, self.config.rope_base)
        draws = torch.arange(batch.items.numel()).view(batch.items.shape)
        x = self.embedding_dropout(embed(batch.items, table, self.table.items), draws)
        for number, block in enumerate(self.blocks, 1):
            x = block(x, tables, mask, derive_draws(draws, number))
        x = self.final_norm(x)
        if self.tp.sequence:
            x = through(x, GATHER, self.tp, tokens=rows * tokens)
        return x.reshape(-1, self.config.dim)[batch.picks]

    def loss(self, batch: Packed) -> Tensor:
        table = self.table()
        hidden = self.hidden(batch, table)
        owner = self.table if self.head is None else self.head
        scored = table if self.head is None else self.head()
        return item_loss(hidden, scored, batch.targets, self.table.items, owner=owner)


def build(
    tp: TensorParallel = ALONE,
    config: ModelConfig = CONFIG,
    *,
    dtype: torch.dtype = torch.float64,
    text: bool = True,
) -> Decoder:
    """A decoder of one seed, whatever the number of ranks; not to be called by two threads at once."""
    torch.manual_seed(0)
    model = Decoder(config, tp, text=text).to(dtype)
    for layer in model.modules():
        if isinstance(layer, ItemTable):
            layer.draw(config.init_std)
        elif isinstance(layer, Linear):
            draw_whole(
                layer, "weight", lambda whole: nn.init.normal_(whole, std=config.init_std), rank=tp.rank
            )
        elif isinstance(layer, RMSNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    return model


def batch() -> Packed:
    """Six users in rows whose tokens 2 and 4 ranks cannot share evenly."""
    random = np.random.default_rng(0)
    sequences = [random.integers(0, ITEMS, length) for length in (5, 1, 12, 7, 3, 9)]
    return pack(sequences, [random.integers(0, ITEMS, len(sequence)) for sequence in sequences])


def over(
    contexts: Sequence[Context], size: int, body: Callable[[TensorParallel], Any], **options: Any
) -> list[Any]:
    """Results of ``body`` on the first ``size`` ranks, each with the tensor-parallel value of their group."""

    def on_rank(context: Context) -> Any:
        return body(TensorParallel(group=context.group(list(range(size))), **options))

    return run_ranks(on_rank, contexts[:size])


def built(
    contexts: Sequence[Context], size: int, make: Callable[[TensorParallel], Any], **options: Any
) -> list[Any]:
    """``make`` on each rank, one after the other: torch has one generator for all threads."""
    return [
        make(TensorParallel(group=context.group(list(range(size))), **options)) for context in contexts[:size]
    ]


def bound(exact: Tensor, dtype: str, config: ModelConfig = CONFIG) -> float:
    """How far two evaluations in different orders may lie apart, relative to the largest element.

    The longest chain of roundings through the decoder and back: per layer twice (forward, backward) four products
    of up to 2 hidden, 3 dim or 64 terms, and norms of dim; then the items, and the predictions' sum.
    """
    rounds = 2 * (
        config.layers * (4 * max(2 * config.hidden, 3 * config.dim, 64) + 2 * config.dim) + ITEMS + 64
    )
    return 2 * gamma(rounds, dtype) * float(exact.abs().max())
