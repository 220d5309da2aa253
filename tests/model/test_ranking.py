"""Ranks of targets from a split table equal those from the table of all scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import model.ranking
from hybridcomm.context import Context
from model.ranking import NotFiniteError, target_ranks
from model.scores import TILE, Tile
from model.tensor_parallel import KEEP, TensorParallel
from model.vocab import Items
from tests.model.parallel import over
from train.evaluate import target_ranks as ranks_of_scores

N, D = 29, 6
RAGGED = Tile(rows=6, columns=7)
FEW = Tile(rows=64, columns=7)
"""More rows than there are, so wider tiles than it says."""


def draw(items: int) -> tuple[Tensor, Tensor, Tensor, list[np.ndarray]]:
    """Small integers, so that scores are exact, and many of them equal; some targets stand in their history."""
    random = np.random.default_rng(items)
    hidden = torch.from_numpy(random.integers(-2, 3, (N, D))).float()
    table = torch.from_numpy(random.integers(-2, 3, (items, D))).float()
    targets = torch.from_numpy(random.integers(0, items, N))
    histories = [random.integers(0, items, random.integers(0, 9)) for _ in range(N)]
    return hidden, table, targets, histories


def split(
    contexts: list[Context],
    size: int,
    data: tuple[Tensor, Tensor, Tensor, list[np.ndarray]],
    tile: Tile = RAGGED,
) -> list[Tensor]:
    hidden, table, targets, histories = data

    def body(tp: TensorParallel) -> Tensor:
        items = Items(count=len(table), tp=tp)
        own = table[items.begin : items.end]
        return target_ranks(hidden, own, targets, items, histories=histories, tile=tile)

    return over(contexts, size, body)


@pytest.mark.parametrize("tile", [RAGGED, FEW], ids=["ragged", "few rows"])
@pytest.mark.parametrize(("size", "items"), [(1, 50), (2, 50), (4, 50), (4, 3), (3, 49)])
def test_ranks_are_those_of_the_whole_table(
    contexts: list[Context], size: int, items: int, tile: Tile
) -> None:
    hidden, table, targets, histories = data = draw(items)
    exact = ranks_of_scores(hidden @ table.T, targets, histories)
    assert all(torch.equal(found, exact) for found in split(contexts, size, data, tile))
    if items == 50:
        assert (exact == items).any()  # a target in its history
        plain = ranks_of_scores(hidden @ table.T, targets, [np.zeros(0, np.int64)] * N)
        assert not torch.equal(exact, plain)


@pytest.mark.parametrize("size", [1, 2])
def test_a_catalogue_of_several_tiles_as_they_come(contexts: list[Context], size: int) -> None:
    hidden, table, targets, histories = data = draw(700)
    exact = ranks_of_scores(hidden @ table.T, targets, histories)
    assert all(torch.equal(found, exact) for found in split(contexts, size, data, TILE))


@pytest.mark.parametrize("size", [1, 2])
def test_equal_rows_tie_whatever_their_bits(contexts: list[Context], size: int) -> None:
    """Items with one vector of arbitrary floats get one score: the rank counts exactly those before the target."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator)
    table = torch.randn(1, D, generator=generator).expand(48, D).contiguous()
    targets = torch.arange(N)
    nothing = [np.zeros(0, np.int64)] * N
    found = split(contexts, size, (hidden, table, targets, nothing), Tile(rows=8, columns=8))
    assert all(torch.equal(each, targets + 1) for each in found)


def test_no_rows_have_no_ranks(contexts: list[Context]) -> None:
    hidden, table, targets, _ = draw(50)
    assert all(len(found) == 0 for found in split(contexts, 2, (hidden[:0], table, targets[:0], [])))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused_on_all_ranks(contexts: list[Context], value: float) -> None:
    hidden, table, targets, histories = draw(50)
    table[49] = value

    def body(tp: TensorParallel) -> str:
        items = Items(count=50, tp=tp)
        own = table[items.begin : items.end]
        with pytest.raises(NotFiniteError) as raised:
            target_ranks(hidden, own, targets, items, histories=histories)
        return str(raised.value)

    assert len(set(over(contexts, 2, body))) == 1


def test_control_counts_that_are_not_summed_are_noticed(
    contexts: list[Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, table, targets, histories = data = draw(50)
    exact = ranks_of_scores(hidden @ table.T, targets, histories)
    monkeypatch.setattr(model.ranking, "TOTAL", KEEP)
    assert not all(torch.equal(found, exact) for found in split(contexts, 2, data))


def test_control_an_ignored_history_is_noticed(
    contexts: list[Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, table, targets, histories = data = draw(50)
    exact = ranks_of_scores(hidden @ table.T, targets, histories)
    nothing = torch.zeros(0, dtype=torch.int64)
    monkeypatch.setattr(model.ranking._Excluded, "inside", lambda *_: (nothing, nothing))
    assert not torch.equal(split(contexts, 1, data)[0], exact)
