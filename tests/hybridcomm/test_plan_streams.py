"""Do programs run to their end? Orders that block each other, steps that are missing, lanes that are full."""

from __future__ import annotations

import dataclasses

import pytest

from hybridcomm import collective_plans as build
from hybridcomm.errors import PlanError
from hybridcomm.plan import Plan, Region, Step
from hybridcomm.plan_streams import check_progress
from tests.hybridcomm.plan_mutants import both_links, compressed, dense, swapped, two_stage, whole_slices
from tests.hybridcomm.strategies import NAMED


def programs(plan: Plan) -> dict[int, list[Step]]:
    return {rank: list(plan.for_rank(rank)) for rank in range(plan.topology.world_size)}


def test_ranks_with_other_exchange_orders_deadlock() -> None:
    for plan in (dense(), swapped(), compressed(), two_stage(), whole_slices(), both_links()):
        mixed = programs(plan)
        order = [i for i, step in enumerate(mixed[0]) if step.stream == "exchange"]
        first, second = order[0], order[-1]
        mixed[0][first], mixed[0][second] = mixed[0][second], mixed[0][first]
        check_progress(programs(plan))
        with pytest.raises(PlanError, match="deadlock"):
            check_progress(mixed)


def test_a_program_that_misses_a_step_deadlocks() -> None:
    plan = dense()
    for rank in range(5):
        for victim in plan.for_rank(rank):
            mixed = programs(plan)
            mixed[rank].remove(victim)
            with pytest.raises(PlanError, match=r"deadlock|never takes"):
                check_progress(mixed)


def test_lanes_without_slots_deadlock_and_errors_name_the_stuck_ranks() -> None:
    with pytest.raises(PlanError, match="rank 1 waits in 0 reduce"):
        check_progress(programs(build.allreduce(NAMED["1x4"], 100, chunk_elems=64)), slots=0)


def test_lanes_bound_how_far_a_rank_runs_ahead() -> None:
    """Rank 0 takes no chunk before rank 1 has handed out five: five slots let them pass, four do not."""
    fields = {"bucket": 0, "shard": 0, "group": (0, 1), "divisor": 1}
    chunks = [
        Step(id=i, op="reduce", chunk=i, region=Region(16 * i, 16 * i + 16), root=0, after=(), **fields)  # type: ignore[arg-type]
        for i in range(5)
    ]
    signal = Step(id=9, op="gather", chunk=9, region=Region(96, 112), root=1, after=(4,), **fields)  # type: ignore[arg-type]
    ours = {
        0: [dataclasses.replace(signal, after=()), *(dataclasses.replace(c, after=(9,)) for c in chunks)],
        1: [*chunks, signal],
    }
    check_progress(ours, slots=5)
    with pytest.raises(PlanError, match="deadlock"):
        check_progress(ours, slots=4)
