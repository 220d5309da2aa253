"""Scores of hidden states against a table, tile by tile: the table of all scores never exists, unless it is small.

    1 tile     hidden rows x table rows, into one buffer of bounded size; fp32 where inputs are shorter
    2 fold     each row's running maximum, and the sum of exponentials below it
    3 join     the ranks' maxima, sums and target scores, in one all-gather
    4 again    backward computes each tile once more, or has kept it if there are few, makes it probabilities, and
               folds both products from it

Sources: running maximum and sum arXiv 1805.02867; recomputed tiles 2205.14135; split vocabularies 1909.08053.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.tensor_parallel import COPY, TensorParallel, without_autocast
from model.weight_gradients import Deferring

__all__ = ["TILE", "Columns", "Kept", "Tile", "Tiles", "fold", "join", "log_sums", "table_gradient"]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Bounds of a tile. 1024 x 256 of fp32 is 1 MiB: it stays in a core's second-level cache. With fewer rows it has as
    many more columns.

    ``kept``: up to so many scores of a call (32 MiB of fp32) stay for backward; for all of them it saves one of four
    products.
    """

    rows: int = 1024
    columns: int = 256
    kept: int = 1 << 23


TILE = Tile()


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which rows of this rank's table each hidden state is scored against: the first ``count`` of them.

    Hidden state ``own[i]`` has row ``places[i]`` as its target (each state one, on one of the ranks). ``bias`` [count]
    is added to scores. Row c has the name ``names[c]``, and the state n leaves out rows named ``leave_out[n]``. A
    queue of ``owner`` takes the table's gradient.
    """

    tp: TensorParallel
    count: int
    own: Tensor
    places: Tensor
    bias: Tensor | None = None
    names: Tensor | None = None
    leave_out: Tensor | None = None
    owner: Deferring | None = None
    tile: Tile = TILE


class Tiles:
    """Tiles of hidden [N, D] @ table[:columns].T, in one buffer: each is gone when the next comes, unless kept."""

    def __init__(
        self, hidden: Tensor, table: Tensor, columns: int, tile: Tile, *, kept: Kept | None = None
    ) -> None:
        self.dtype = hidden.dtype if hidden.dtype is torch.float64 else torch.float32
        self.hidden, self.table, self.columns, self.tile = hidden, table, columns, tile
        numel = tile.rows * tile.columns
        self.width = numel // max(1, min(tile.rows, len(hidden)))
        """Columns of a tile."""
        self._buffer, self._kept = hidden.new_empty(numel, dtype=self.dtype), kept

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows, and their hidden states."""
        for begin in range(0, len(self.hidden), self.tile.rows):
            rows = slice(begin, min(begin + self.tile.rows, len(self.hidden)))
            yield rows, self.hidden[rows].to(self.dtype)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of columns, and their table rows."""
        for begin in range(0, self.columns, self.width):
            columns = slice(begin, min(begin + self.width, self.columns))
            yield columns, self.table[columns].to(self.dtype)

    def of(self, block: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks of columns, their table rows, and the scores of ``block`` against them."""
        for columns, part in self.parts():
            yield columns, part, self.scores(block, part)

    def scores(self, block: Tensor, part: Tensor) -> Tensor:
        """A tile."""
        numel = len(block) * len(part)
        if self._kept is not None and self._kept.takes(numel):
            return block @ part.T
        return torch.mm(block, part.T, out=self._buffer[:numel].view(len(block), len(part)))


class Kept:
    """The first tiles of a forward pass: (rows, exponentials below the maximum of the time, that maximum)."""

    def __init__(self, numel: int) -> None:
        self.tiles: list[tuple[slice, Tensor, Tensor]] = []
        self._room = numel
        self._scaled = False

    def takes(self, numel: int) -> bool:
        """Whether the next tile, of so many scores, is to be kept; once one is not, none is."""
        self._room -= numel
        return self._room >= 0

    def add(self, rows: slice, scores: Tensor, peak: Tensor) -> None:
        """A tile that was computed in memory of its own."""
        if self._room >= 0:
            self.tiles.append((rows, scores, peak))

    def chances(self, log_sum: Tensor) -> list[Tensor]:
        """Probabilities, made of them in place when they are first asked for."""
        for rows, tile, peak in () if self._scaled else self.tiles:
            tile.mul_((peak - log_sum[rows]).exp_()[:, None])
        self._scaled = True
        return [tile for _, tile, _ in self.tiles]


@torch.compiler.disable
def log_sums(hidden: Tensor, table: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """For each hidden state the log of the sum of exponentials of its scores, and its target's score.

    hidden [N, D], the same on all ranks; table [R, D], this rank's rows -> two tensors [N] over all ranks' rows, fp32
    (fp64 of fp64). A state without scores gets the lowest finite number. The gradient of ``hidden`` is the sum over
    the ranks; under sequence parallelism only this rank's part of it, for GATHER to sum.
    """
    return _LogSums.apply(hidden, table, columns)


class _LogSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
        with without_autocast(hidden):
            kept = Kept(columns.tile.kept) if any(ctx.needs_input_grad) else None
            log_sum, target = _joined(fold(hidden, table, columns, kept=kept), columns.tp)
            ctx.save_for_backward(hidden, table, log_sum)
            ctx.columns, ctx.kept = columns, kept
            ctx.queue = columns.owner.queue if columns.owner is not None and table.is_leaf else None
            # A computed table is not held by this: it goes when backward has used it.
            ctx.leaf = None if ctx.queue is None else table
            return log_sum, target

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_sum: Tensor, by_target: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        columns: Columns = ctx.columns
        again = partial(_gradients, *ctx.saved_tensors, columns, (by_sum, by_target), kept=ctx.kept)
        hidden_needed, table_needed, _ = ctx.needs_input_grad
        queue = ctx.queue
        with without_autocast(by_sum):
            hidden_grad, table_grad = again(of_hidden=hidden_needed, of_table=table_needed and queue is None)
            if hidden_grad is not None and columns.tp.size > 1 and not columns.tp.sequence:
                hidden_grad = COPY.backward(columns.tp, hidden_grad, 0, False).wait()
        if table_needed and queue is not None:
            queue.put(ctx.leaf, by_sum, lambda _: again(of_hidden=False, of_table=True)[1])
        return None if hidden_grad is None else hidden_grad.to(ctx.saved_tensors[0].dtype), table_grad, None


def fold(
    hidden: Tensor, table: Tensor, columns: Columns, mean: Tensor | None = None, *, kept: Kept | None = None
) -> Tensor:
    """This rank's statistics of the states, [3, N]: largest score, sum of exponentials below it, target's score.

    ``mean`` [N, D], zeros of the tiles' dtype, gets the sum of table rows, each times the exponential of its score
    below the largest: the hidden state's gradient by the log of this rank's sum alone, but for its scale. ``kept``
    takes the tiles that it has room for.
    """
    tiles = Tiles(hidden, table, columns.count, columns.tile, kept=kept)
    stats = hidden.new_zeros(3, len(hidden), dtype=tiles.dtype)
    stats[0] = torch.finfo(tiles.dtype).min
    for rows, block in tiles.blocks():
        peak, total, _ = (row[rows] for row in stats)
        for part, table_rows, scores in tiles.of(block):
            _adjust(scores, columns, rows, part)
            higher = torch.maximum(peak, scores.amax(1))
            scores.sub_(higher[:, None]).exp_()
            total.mul_((peak - higher).exp_()).add_(scores.sum(1))
            if mean is not None:
                mean[rows].mul_((peak - higher).exp_()[:, None]).addmm_(scores, table_rows)
            peak.copy_(higher)
            if kept is not None:
                kept.add(rows, scores, higher)
    own, places = columns.own, columns.places
    stats[2, own] = (hidden[own].to(tiles.dtype) * table[places].to(tiles.dtype)).sum(1)
    return stats


def table_gradient(
    hidden: Tensor,
    table: Tensor,
    columns: Columns,
    log_sum: Tensor,
    scale: float,
    *,
    kept: Kept | None = None,
) -> Tensor:
    """Of this rank's table, for ``scale`` times the sum of the cross-entropies; ``log_sum`` [N] of all ranks, ``kept``
    of `fold`."""
    by = torch.full_like(log_sum, scale)
    found = _gradients(hidden, table, log_sum, columns, (by, -by), of_hidden=False, of_table=True, kept=kept)[
        1
    ]
    assert found is not None  # noqa: S101 (it was asked for)
    return found


def _gradients(
    hidden: Tensor,
    table: Tensor,
    log_sum: Tensor,
    columns: Columns,
    by: tuple[Tensor, Tensor],
    *,
    of_hidden: bool,
    of_table: bool,
    kept: Kept | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """This rank's part of the hidden states' gradient, and its table's, of a loss whose derivatives by the logs of sums
    and by the target scores are ``by``; ``kept`` are the tiles that `fold` has made of the same arguments."""
    again = iter(() if kept is None else kept.chances(log_sum))
    tiles = Tiles(hidden, table, columns.count, columns.tile)
    hidden_grad = torch.zeros_like(hidden, dtype=tiles.dtype) if of_hidden else None
    table_grad = torch.zeros_like(table, dtype=tiles.dtype) if of_table else None
    for rows, block in tiles.blocks() if of_hidden or of_table else ():
        weight = by[0][rows, None]
        weighted = block * weight
        for part, table_rows in tiles.parts():
            chances = next(again, None)
            if chances is None:
                chances = tiles.scores(block, table_rows)
                _adjust(chances, columns, rows, part)
                chances.sub_(log_sum[rows, None]).exp_()
            if hidden_grad is not None:
                hidden_grad[rows].addmm_(chances, table_rows)
            if table_grad is not None:
                table_grad[part].addmm_(chances.T, weighted)
        if hidden_grad is not None:
            hidden_grad[rows].mul_(weight)
    own, places = columns.own, columns.places
    weight = by[1][own, None]
    if hidden_grad is not None:
        hidden_grad.index_add_(0, own, table[places].to(tiles.dtype) * weight)
    if table_grad is not None:
        table_grad.index_add_(0, places, hidden[own].to(tiles.dtype) * weight)
        table_grad = table_grad.to(table.dtype)
    return hidden_grad, table_grad


def _adjust(scores: Tensor, columns: Columns, rows: slice, part: slice) -> None:
    if columns.bias is not None:
        scores.add_(columns.bias[part])
    if columns.names is not None and columns.leave_out is not None:
        scores.masked_fill_(columns.names[part] == columns.leave_out[rows, None], -torch.inf)


def _joined(stats: Tensor, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    """(log of the sum, target score) of all ranks, from each one's maximum, sum below it and target score, [3, N]."""
    every = stats[None] if tp.group is None else stats.new_empty(tp.size, *stats.shape)
    if tp.group is not None:
        tp.group.all_gather(every, stats)
    return join(every)


def join(every: Tensor) -> tuple[Tensor, Tensor]:
    """(log of the sum, target score) [N] over all ranks' statistics, [ranks, 3, N] as of `fold`."""
    peaks, totals, targets = every.unbind(1)
    peak = peaks.amax(0)
    log_sum = peak + (totals * (peaks - peak).exp()).sum(0).log()
    return log_sum.clamp(min=torch.finfo(every.dtype).min), targets.sum(0)
