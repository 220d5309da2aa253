"""A model's parts are the whole model, in order; no cut is better than the one that is taken."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridcomm.errors import UnsupportedError
from model.config import ModelConfig
from model.parts import Part, cut, split
from model.recommender import Recommender

COSTS = st.floats(0.0, 20.0)


@given(layers=st.integers(1, 9), data=st.data(), embedding=COSTS, head=COSTS)
def test_parts_are_the_whole_and_the_best_cut(
    layers: int, data: st.DataObject, embedding: float, head: float
) -> None:
    stages = data.draw(st.integers(1, min(layers + 2, 5)))
    speeds = tuple(data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=stages, max_size=stages)))
    parts = split(layers, stages, embedding=embedding, head=head, speeds=speeds)
    assert [layer for part in parts for layer in part.layers] == list(range(layers))
    assert [part.embeds for part in parts] == [True] + [False] * (stages - 1)
    assert [part.scores for part in parts] == [False] * (stages - 1) + [True]
    for part in parts:
        part.check(layers)
    units = [embedding, *[1.0] * layers, head]
    best = min(
        max(sum(units[b:e]) / rate for b, e, rate in zip((0, *cut), (*cut, len(units)), speeds, strict=True))
        for cut in combinations(range(1, len(units)), stages - 1)
    )
    taken = max(
        (part.embeds * embedding + len(part.layers) + part.scores * head) / rate
        for part, rate in zip(parts, speeds, strict=True)
    )
    assert taken == pytest.approx(best, rel=1e-9)


def test_a_head_that_costs_ten_layers_gets_a_stage_of_its_own() -> None:
    assert [str(part) for part in split(8, 2, head=10)] == ["embedding + layers 0-7", "head"]
    assert [str(part) for part in split(8, 2, head=0)] == ["embedding + layers 0-3", "layers 4-7 + head"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part(layers=range(2, 5)), "contiguous layers of 0..3"),
        (Part(layers=range(1, 2), embeds=True), "before layer 0"),
        (Part(layers=range(1, 2), scores=True), "behind layer 3"),
        (Part(layers=range(0)), "does nothing"),
    ],
)
def test_impossible_parts_are_refused(part: Part, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        part.check(4)


def test_more_stages_than_things_are_refused() -> None:
    assert len(split(2, 4)) == 4
    with pytest.raises(UnsupportedError, match="use at most 4"):
        split(2, 5)


@pytest.mark.parametrize("tied", [True, False])
def test_parts_draw_the_wholes_weights(tied: bool) -> None:
    config = ModelConfig(dim=8, layers=3, heads=2, hidden=6, tied=tied)
    features = torch.ones(11, 4)

    def build(part: Part | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        return Recommender(config, 11, features, part=part).state_dict()

    whole, seen = build(), set()
    for part in split(3, 3, head=2):
        for name, value in build(part).items():
            assert torch.equal(value, whole[name]), name
            seen.add(name)
    assert seen == set(whole)


def test_a_cut_by_its_starts() -> None:
    assert cut(3, [0, 2, 4]) == (
        Part(layers=range(1), embeds=True), Part(layers=range(1, 3)), Part(layers=range(3, 3), scores=True),
    )  # fmt: skip
    for starts in ([], [1, 2], [0, 2, 2], [0, 5]):
        with pytest.raises(UnsupportedError, match="ascending from 0 to 4"):
            cut(3, starts)
