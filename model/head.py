"""The item head apart from the last stage: one rank's shard of the items, in the steps of vocabulary parallelism.

    1 score      hidden states against this rank's items: statistics, and its part of their gradient but for the scale
    2 join       all ranks' statistics: loss, and the true sums, which are the missing scale
    3 states     the hidden states' gradient from all parts;  table: the gradient of this rank's items

Source: arXiv 2411.05288, algorithm 2; tiles as in `model.scores`. The loss is that of the full softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.recommender import draw_seed, draw_unit
from model.scores import Columns, Kept, fold, join, table_gradient
from model.tensor_parallel import TensorParallel, without_autocast
from model.vocab import Items, ItemTable

__all__ = ["HeadShard", "Scored"]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a rank keeps of a microbatch.

    ``statistics`` [3, N] go to all ranks; ``part`` [N + own, D] to the last stage: what `model.scores.fold` calls mean,
    and the table's rows of the targets that are this rank's. ``kept``: tiles that `HeadShard.accumulate` need not make
    again.
    """

    hidden: Tensor
    rows: Tensor
    columns: Columns
    statistics: Tensor
    part: Tensor
    kept: Kept


class HeadShard(nn.Module):
    """A rank's shard of the items that hidden states are scored against; as a module the table has its usual names.

    ``items`` says which; its ranks are all those of a replica. A tied model's shard is a copy of rows of the first
    stage's table: both start with the same values, and need the sum of both gradients (`train.replica`). ``tp``: the
    ranks that share the first stage's table; a text projection's gradient is summed over them as there.
    """

    def __init__(
        self, config: ModelConfig, features: Tensor | None, *, items: Items, tp: TensorParallel
    ) -> None:
        super().__init__()
        self.tied = config.tied
        seed = draw_seed()
        features = features if config.text and config.tied else None
        self.table = ItemTable(items.count, config.dim, features=features, tp=tp, items=items)
        draw_unit(self.table, seed * 4096 + (not config.tied), config.init_std, rank=items.tp.rank)

    @property
    def items(self) -> Items:
        return self.table.items

    def score(self, hidden: Tensor, targets: Tensor) -> Scored:
        """hidden [N, D] and targets int64 [N], the same on all ranks."""
        rows = self.table()
        own, places = self.items.here(targets)
        columns = Columns(tp=self.items.tp, count=len(rows), own=own, places=places)
        with torch.no_grad(), without_autocast(hidden):
            dtype = torch.float64 if hidden.dtype is torch.float64 else torch.float32
            part = hidden.new_zeros(len(hidden) + len(own), hidden.shape[1], dtype=dtype)
            kept = Kept(columns.tile.kept)
            statistics = fold(hidden, rows, columns, part[: len(hidden)], kept=kept)
            part[len(hidden) :] = rows[places]
        return Scored(hidden=hidden, rows=rows, columns=columns, statistics=statistics, part=part, kept=kept)

    def part_lengths(self, targets: Tensor) -> list[int]:
        """How many rows each rank's `Scored.part` has."""
        return [len(targets) + len(self._own(targets, rank)) for rank in range(self.items.tp.size)]

    def _own(self, targets: Tensor, rank: int) -> Tensor:
        begin, end = self.items.sharding.bounds(rank)
        return ((targets >= begin) & (targets < end)).nonzero()[:, 0]

    def loss(self, every: Tensor) -> Tensor:
        """Sum of the cross-entropies, from all ranks' statistics, [ranks, 3, N]; scalar, the same on all ranks."""
        log_sum, target = join(every)
        return (log_sum - target).sum()

    def states_gradient(
        self, parts: Sequence[tuple[int, Tensor]], every: Tensor, targets: Tensor, scale: float
    ) -> Tensor:
        """[N, D]: of ``scale`` times the loss, as far as it comes from ``parts``, (rank, its `Scored.part`)."""
        log_sum = join(every)[0]
        gradient = parts[0][1].new_zeros(len(targets), parts[0][1].shape[1])
        for rank, part in parts:
            mean, rows = part.split([len(targets), len(part) - len(targets)])
            gradient.addcmul_(mean, (every[rank, 0] - log_sum).exp()[:, None])
            gradient.index_add_(0, self._own(targets, rank), rows, alpha=-1.0)
        return gradient.mul_(scale)

    def accumulate(self, scored: Scored, every: Tensor, scale: float) -> None:
        """Adds the gradients of this rank's parameters, of ``scale`` times the loss."""
        log_sum = join(every)[0]
        with torch.no_grad(), without_autocast(scored.hidden):
            rows = scored.rows.detach()
            gradient = table_gradient(scored.hidden, rows, scored.columns, log_sum, scale, kept=scored.kept)
        if not scored.rows.is_leaf:
            scored.rows.backward(gradient)
            return
        with torch.no_grad():
            weight = self.table.embedding
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
