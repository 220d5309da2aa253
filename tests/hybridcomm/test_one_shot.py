"""Small all-reduces of a single node: one step in which every rank sums all inputs itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from hybridcomm import _C, collective_plans, lower, policy
from hybridcomm.errors import PlanError
from hybridcomm.plan import Plan
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts
from tests.exact import exact_ints, exact_sum

NODE = Topology.virtual(1, 3)


def plan_of(numel: int, **options: Any) -> Plan:
    return collective_plans.allreduce(NODE, numel, **options)


def ops(plan: Plan) -> set[str]:
    return {step.op for step in plan.steps}


def test_policy_depends_on_size_and_ranks_alone() -> None:
    limit = policy.one_shot_nbytes(3) // 4
    assert ops(plan_of(limit)) == {"reduce_all"}
    assert ops(plan_of(limit + 1)) == {"reduce", "gather"}
    assert ops(plan_of(limit, dtype="float64")) == {"reduce", "gather"}
    assert policy.one_shot_nbytes(2) > policy.one_shot_nbytes(4) > 0
    assert ops(plan_of(limit, chunk_elems=16)) == {"reduce", "gather"}
    assert ops(plan_of(2048, chunk_nbytes=4096)) == {"reduce", "gather"}  # more than a slot holds
    assert ops(collective_plans.barrier(NODE)) == {"reduce_all"}
    assert ops(collective_plans.allreduce(Topology.virtual(2, 2), 8)).isdisjoint({"reduce_all"})


def test_text_round_trips_and_the_plan_is_right() -> None:
    plan = plan_of(100, op="mean")
    plan.check()
    assert Plan.parse(plan.text) == plan
    assert plan.wire_nbytes() == 0


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a rank left out": ({"group": (0, 1)}, "all ranks of one node"),
    "a root": ({"root": 0}, "takes no root"),
    "an end left out": ({"region": (0, 99)}, "promises"),
    "no division": ({"divisor": 1}, "promises"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_step_is_caught(what: str) -> None:
    plan = plan_of(100, op="mean")
    change, message = BROKEN[what]
    if "region" in change:
        change = {"region": type(plan.steps[0].region)(*change["region"])}
    broken = dataclasses.replace(plan, steps=(dataclasses.replace(plan.steps[0], **change),))
    with pytest.raises(PlanError, match=message):
        broken.check()


def test_a_step_twice_counts_ranks_twice() -> None:
    plan = plan_of(100)
    again = dataclasses.replace(plan.steps[0], id=1, after=(0,))
    with pytest.raises(PlanError, match="twice"):
        dataclasses.replace(plan, steps=(plan.steps[0], again)).check()


def sums(world: int, numel: int, calls: int = 30) -> bool:
    """Whether all calls, back to back, give all ranks the exact sum."""
    with engine_contexts(Topology.virtual(1, world), timeout=2.0) as contexts:

        def body(rank: int) -> bool:
            good = True
            for call in range(calls):
                array = exact_ints(rank=rank, numel=numel, world=world, call=call).astype(np.float32)
                contexts[rank].allreduce(array)
                good &= bool((array == exact_sum(numel=numel, world=world, call=call)).all())
            return good

        return each_rank(body, world) == [True] * world


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("numel", [1, 31, 1024])
def test_sums_are_exact_back_to_back(world: int, numel: int) -> None:
    assert sums(world, numel)


@pytest.mark.parametrize("bug", ["an input forgotten", "an input twice", "another's input only"])
def test_planted_bugs_are_caught(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    original = lower._Lowering._add

    def add(self: Any, kind: Any, stream: Any, step: Any, **options: Any) -> int:
        if kind == _C.Kind.collect:
            own, others = (
                [self._local(self.rank)],
                [s for s in options["sources"] if s != self._local(self.rank)],
            )
            changed = {"an input forgotten": own, "an input twice": own + own + others}
            options["sources"] = changed.get(bug, others)
        return original(self, kind, stream, step, **options)

    monkeypatch.setattr(lower._Lowering, "_add", add)
    assert not sums(2, 100, calls=3)
