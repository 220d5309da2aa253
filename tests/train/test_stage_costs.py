"""The cut of a model goes by what the whole schedule takes, uneven stages included."""

from __future__ import annotations

from itertools import combinations

import pytest

from model.config import ModelConfig
from model.parts import cut, split
from train.pipeline import PipelineSchedule, check, lower, make_schedule, simulate
from train.replica import ModelSpec
from train.stage_costs import best_parts, relative_costs, stage_costs

CASES = [
    (name, ranks, layers, embedding, head)
    for name in ("1f1b", "zbv", "interleaved", "zb-h1")
    for ranks, layers in ((2, 6), (3, 7))
    for embedding, head in ((0.0, 0.0), (0.0, 3.5), (2.0, 2.0))
]


def seconds(
    schedule: PipelineSchedule, layers: int, starts: list[int], embedding: float, head: float
) -> float:
    return simulate(schedule, stage_costs(cut(layers, starts), embedding=embedding, head=head)).step_time


@pytest.mark.parametrize(("name", "ranks", "layers", "embedding", "head"), CASES)
def test_no_cut_of_all_is_much_faster(
    name: str, ranks: int, layers: int, embedding: float, head: float
) -> None:
    """Never slower than the cut by the slowest stage; close to the best of all cuts, which moves of one may miss."""
    schedule = make_schedule(name, ranks, 6)
    weights = {"embedding": embedding, "head": head}
    found = best_parts(schedule, layers, **weights)
    took = simulate(schedule, stage_costs(found, **weights)).step_time
    by_stage = split(layers, schedule.stages, **weights)
    assert took <= simulate(schedule, stage_costs(by_stage, **weights)).step_time
    best = min(
        seconds(schedule, layers, [0, *rest], embedding, head)
        for rest in combinations(range(1, layers + 2), schedule.stages - 1)
    )
    assert took <= 1.1 * best
    assert [layer for part in found for layer in part.layers] == list(range(layers))


def test_a_v_gives_its_first_rank_less_beside_the_head() -> None:
    """A head of four layers: by the slowest stage alone rank 0 would have as many layers as ever; rank 1 would wait."""
    schedule = make_schedule("zbv", 2, 8)
    weights = {"embedding": 0.0, "head": 4.0}
    by_stage, found = split(6, 4, **weights), best_parts(schedule, 6, **weights)

    def loads(parts: tuple) -> list[float]:  # type: ignore[type-arg]
        costs = stage_costs(parts, **weights)
        return [sum(costs.stages[s].forward for s in schedule.stages_of(rank)) for rank in range(2)]

    assert max(loads(found)) < max(loads(by_stage))
    before, after = (
        simulate(schedule, stage_costs(parts, **weights)).step_time for parts in (by_stage, found)
    )
    assert after < 0.95 * before


def test_costs_order_a_split_head() -> None:
    """Uneven stages: HEAD_S stands where the last stage's states are there by these costs, and the lists are right."""
    schedule = make_schedule("1f1b", 3, 6)
    costs = stage_costs(cut(5, [0, 1, 4]), embedding=0.0, head=0.0)
    assert costs.stages[0].forward == 1e-3  # an embedding that costs nothing takes some time
    lowered = lower(schedule, head=True, costs=costs)
    check(lowered)
    assert lowered != lower(schedule, head=True)


def test_heads_cost_what_items_do() -> None:
    few, many = (relative_costs(ModelSpec(config=ModelConfig(), num_items=items)) for items in (1000, 30_000))
    assert few[0] == many[0] == 0
    assert many[1] == pytest.approx(30 * few[1])
