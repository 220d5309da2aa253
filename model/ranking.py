"""The rank of each target among all items, from a table split over the ranks, without the table of scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.scores import TILE, Tile, Tiles
from model.tensor_parallel import TOTAL
from model.vocab import Items

__all__ = ["NotFiniteError", "target_ranks"]


class NotFiniteError(ArithmeticError):
    """A score is infinite or not a number: it would compare with the others in no meaningful way."""


@torch.no_grad()
def target_ranks(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    items: Items,
    *,
    histories: Sequence[np.ndarray],
    tile: Tile = TILE,
) -> Tensor:
    """Rank (1 = best) of each row's target among all items that are not in the row's history: int64 [N].

    hidden [N, D], the same on all ranks; table [rows, D], this rank's; targets int64 [N]; a history (item indices) for
    each row. Ties go to the lower index; a target that is in the history gets the last rank. Same on all
    ranks, as is `NotFiniteError` on a score that is not finite.
    """
    items.check(table)
    tiles = Tiles(hidden, table, len(table), tile)
    index = torch.arange(items.begin, items.end, device=hidden.device)
    excluded = _Excluded(histories, targets, items, tiles)
    # Both passes compute the same tiles with the same bits, so a target ties with itself and with its equals.
    own = hidden.new_zeros(len(hidden) + 1, dtype=tiles.dtype)
    places = targets - items.begin
    for rows, block in tiles.blocks():
        for part, _, scores in tiles.of(block):
            inside = ((places[rows] >= part.start) & (places[rows] < part.stop)).nonzero()[:, 0]
            own[inside + rows.start] = scores[inside, places[rows][inside] - part.start]
            own[-1] += not torch.isfinite(scores).all()
    if items.tp.size > 1:
        TOTAL.forward(items.tp, own, 0, False)
    if own[-1] != 0:
        raise NotFiniteError("the model's scores are not finite; the training has diverged")
    better = hidden.new_zeros(len(hidden), dtype=torch.int64)
    for rows, block in tiles.blocks():
        target = own[:-1][rows, None]
        for part, _, scores in tiles.of(block):
            scores[excluded.inside(rows, part)] = -torch.inf
            before = index[part] < targets[rows, None]
            better[rows] += ((scores > target) | ((scores == target) & before)).sum(1)
    if items.tp.size > 1:
        TOTAL.forward(items.tp, better, 0, False)
    return torch.where(excluded.targets, items.count, better + 1)


class _Excluded:
    """The rows' histories, sorted by tile."""

    def __init__(self, histories: Sequence[np.ndarray], targets: Tensor, items: Items, tiles: Tiles) -> None:
        rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
        columns = np.concatenate([np.zeros(0, np.int64), *histories])
        found = np.zeros(len(targets), np.bool_)
        found[rows[columns == targets.cpu().numpy()[rows]]] = True
        self.targets, self._device = torch.from_numpy(found).to(targets.device), targets.device
        here = (columns >= items.begin) & (columns < items.end)
        rows, columns = rows[here], columns[here] - items.begin
        self._height, self._width = tiles.tile.rows, tiles.width
        self._across = -(-(items.end - items.begin) // self._width)
        place = rows // self._height * self._across + columns // self._width
        order = np.argsort(place, kind="stable")
        self._place, self._rows, self._columns = place[order], rows[order], columns[order]

    def inside(self, rows: slice, part: slice) -> tuple[Tensor, Tensor]:
        """(rows, columns) within a tile."""
        place = rows.start // self._height * self._across + part.start // self._width
        begin, end = np.searchsorted(self._place, [place, place + 1])
        found = slice(int(begin), int(end))
        places = self._rows[found] - rows.start, self._columns[found] - part.start
        return torch.from_numpy(places[0]).to(self._device), torch.from_numpy(places[1]).to(self._device)
