"""The catalogue's items split over the tensor-parallel ranks: embedding, full softmax and sampled softmax.

Each rank holds a contiguous range of the item table (arXiv 1909.08053, section 3), however many items and ranks
there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridcomm.errors import UnsupportedError
from model.linear import Linear
from model.scores import TILE, Columns, Tile, log_sums
from model.sharding import Sharding, draw_whole
from model.tensor_parallel import ALONE, SCATTER, TOTAL, TensorParallel, through
from model.weight_gradients import Deferring

__all__ = ["ItemTable", "Items", "Negatives", "draw_negatives", "embed", "item_loss", "sampled_item_loss"]


@dataclass(frozen=True, kw_only=True)
class Items:
    """``count`` items, split over the ranks of ``tp``: this one has those from ``begin`` to ``end``.

    ``sizes``: how many each rank has, where that is not `balanced`.
    """

    count: int
    tp: TensorParallel = ALONE
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.sizes is not None and (len(self.sizes), sum(self.sizes)) != (self.tp.size, self.count):
            raise UnsupportedError(
                f"{self.count} items on {self.tp.size} ranks are not split as {self.sizes}"
            )

    @property
    def sharding(self) -> Sharding:
        return Sharding(dim=0, sizes=self.sizes or self.tp.sizes(self.count))

    @property
    def begin(self) -> int:
        return self.sharding.bounds(self.tp.rank)[0]

    @property
    def end(self) -> int:
        return self.sharding.bounds(self.tp.rank)[1]

    def here(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Which of ``items`` [N] this rank has: their places among them, and their rows in its table."""
        self.check_range(items)
        places = ((items >= self.begin) & (items < self.end)).nonzero()[:, 0]
        return places, items[places] - self.begin

    def check_range(self, items: Tensor) -> None:
        if items.numel() and (int(items.min()) < 0 or int(items.max()) >= self.count):
            raise UnsupportedError(
                f"items must be in 0..{self.count - 1}: {int(items.min())}..{int(items.max())}"
            )

    def check(self, table: Tensor) -> None:
        if len(table) != self.end - self.begin:
            raise UnsupportedError(
                f"rank {self.tp.rank} of {self.tp.size} has items {self.begin}..{self.end - 1}, and a table of "
                f"{len(table)} rows"
            )


class ItemTable(Deferring):
    """Vectors of this rank's items: an embedding, plus a projection of their frozen text features, if any.

    ``features`` fp32 [items, F] are those of all items; the rank keeps its rows, in a buffer that checkpoints leave
    out. Calling it gives [rows, D]. ``items``: another split than over ``tp``; the projection's gradient is to be
    summed over ``tp`` all the same.
    """

    features: Tensor | None

    def __init__(
        self,
        count: int,
        dim: int,
        *,
        features: Tensor | None = None,
        tp: TensorParallel = ALONE,
        items: Items | None = None,
    ) -> None:
        super().__init__()
        self.items = Items(count=count, tp=tp) if items is None else items
        self.sharding = {"embedding": self.items.sharding}
        self.embedding = nn.Parameter(torch.empty(self.items.end - self.items.begin, dim))
        own = None if features is None else self.items.sharding.take(features, self.items.tp.rank)
        self.register_buffer("features", own, persistent=False)
        if own is not None:
            self.text_projection = Linear(own.shape[1], dim, tp=tp, summed=True)

    def draw(self, std: float) -> None:
        """Draws the embedding from N(0, std^2), the same items' rows at any number of ranks."""
        draw_whole(self, "embedding", lambda whole: nn.init.normal_(whole, std=std), rank=self.items.tp.rank)

    def forward(self) -> Tensor:
        return (
            self.embedding if self.features is None else self.embedding + self.text_projection(self.features)
        )


def embed(item_ids: Tensor, table: Tensor, items: Items) -> Tensor:
    """Vectors of ``item_ids`` (int64 [...]) from all ranks' tables: [..., D].

    Under sequence parallelism this rank's part of the flattened tokens, [n, D].
    """
    items.check(table)
    if items.tp.size == 1:
        items.check_range(item_ids)
        return F.embedding(item_ids, table)
    places, rows = items.here(item_ids.reshape(-1))
    vectors = table.new_zeros(item_ids.numel(), table.shape[1]).index_copy(
        0, places, F.embedding(rows, table)
    )
    if items.tp.sequence:
        return through(vectors, SCATTER, items.tp, tokens=item_ids.numel())
    return through(vectors, TOTAL, items.tp).view(*item_ids.shape, table.shape[1])


def item_loss(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    items: Items,
    *,
    owner: Deferring | None = None,
    tile: Tile = TILE,
) -> Tensor:
    """Sum over predictions of the cross-entropy over all items, in nats; no score table is made.

    hidden [N, D], the same on all ranks; table [rows, D], this rank's; targets int64 [N] -> scalar, the same on all
    ranks. Equals the sum of ``F.cross_entropy(hidden @ whole_table.T, targets)``. Under sequence parallelism
    ``hidden`` comes through GATHER, which sums its gradient. ``owner`` may have a queue that the table's gradient is
    put off into, if the table is a leaf (an embedding alone, or detached). One that is computed, from text say, gets
    its gradient at once: the layers that it comes from are still to be run through.
    """
    items.check(table)
    own, places = items.here(targets)
    columns = Columns(tp=items.tp, count=len(table), own=own, places=places, owner=owner, tile=tile)
    log_sum, target = log_sums(hidden, table, columns)
    return (log_sum - target).sum()


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """Drawn items, int64 [S], and the log of how often each was expected to be drawn, [S]."""

    items: Tensor
    log_expected: Tensor


def draw_negatives(num_items: int, count: int, *, seed: int, weights: Tensor | None = None) -> Negatives:
    """Draws ``count`` of ``num_items`` items, the same on every rank and at any number of them.

    Without ``weights`` each item at most once, all alike; with ``weights`` [items] >= 0 with replacement.
    """
    generator = torch.Generator().manual_seed(seed)
    if weights is None:
        if count > num_items:
            raise UnsupportedError(f"{count} different items cannot be drawn from {num_items}")
        drawn = torch.randperm(num_items, generator=generator)[:count]
        expected = torch.full((count,), count / num_items, dtype=torch.float64)
    else:
        if len(weights) != num_items:
            raise UnsupportedError(f"{len(weights)} weights for {num_items} items")
        chances = weights.double() / weights.double().sum()
        drawn = torch.multinomial(chances, count, replacement=True, generator=generator)
        expected = count * chances[drawn]
    return Negatives(items=drawn, log_expected=expected.log())


def sampled_item_loss(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    items: Items,
    *,
    negatives: Negatives,
    tile: Tile = TILE,
) -> Tensor:
    """`item_loss` with the softmax's sum estimated from the target and the negatives that all states share.

    A negative's score is lowered by the log of its expected count, and left out where it is the target. The estimate
    of the sum is unbiased then, since the target itself is always there (Bengio and Senecal, "Adaptive
    importance sampling to accelerate training of a neural probabilistic language model", 2008).
    """
    items.check(table)
    drawn, rows = items.here(negatives.items)
    own, places = items.here(targets)
    picked = F.embedding(torch.cat([rows, places]), table)
    columns = Columns(
        tp=items.tp,
        count=len(rows),
        own=own,
        places=torch.arange(len(own), device=rows.device) + len(rows),
        bias=-negatives.log_expected[drawn].to(hidden.dtype),
        names=negatives.items[drawn],
        leave_out=targets,
        tile=tile,
    )
    log_sum, target = log_sums(hidden, picked, columns)
    return (torch.logaddexp(log_sum, target) - target).sum()
