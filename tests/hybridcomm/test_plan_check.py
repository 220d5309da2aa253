"""Good plans pass; every planted bug is caught, and by the question that is meant to catch it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm import collective_plans as build
from hybridcomm.errors import PlanError
from hybridcomm.plan import ALL, Plan, Region
from hybridcomm.topology import Topology
from tests.hybridcomm.plan_mutants import (
    COMPRESSED,
    changed,
    compressed,
    dense,
    find,
    others,
    renumbered,
    swapped,
)
from tests.hybridcomm.strategies import NAMED, SIZES, every_plan, topologies


@pytest.mark.parametrize("name", NAMED)
def test_every_builder_passes_on_named_topologies(name: str) -> None:
    for numel in SIZES:
        for plan in every_plan(NAMED[name], numel):
            plan.check()
            plan.check(slots=1)


@given(topology=topologies(), numel=st.integers(0, 5000))
@settings(max_examples=40)
def test_every_builder_passes_on_random_topologies(topology: Topology, numel: int) -> None:
    for plan in every_plan(topology, numel):
        plan.check()


@pytest.mark.parametrize("make", [dense, swapped, *COMPRESSED])
def test_each_dropped_step_is_caught(make: Callable[[], Plan]) -> None:
    plan = make()
    for victim in plan.steps:
        with pytest.raises(PlanError):
            renumbered(plan, [step for step in plan.steps if step is not victim]).check()


def test_each_dropped_step_of_the_other_collectives_is_caught() -> None:
    for plan in others():
        for victim in plan.steps:
            with pytest.raises(PlanError):
                renumbered(plan, [step for step in plan.steps if step is not victim]).check()


@pytest.mark.parametrize("make", [dense, swapped, *COMPRESSED])
def test_each_doubled_step_is_caught(make: Callable[[], Plan]) -> None:
    """A step that runs twice counts ranks twice, averages twice, or is an unordered second write."""
    plan = make()
    for victim in plan.steps:
        twice = [*plan.steps[: victim.id + 1], victim, *plan.steps[victim.id + 1 :]]
        ids = dataclasses.replace(plan, steps=tuple(
            dataclasses.replace(
                step,
                id=place,
                after=tuple(b if b <= victim.id else b + 1 for b in step.after),
            )
            for place, step in enumerate(twice)
        ))  # fmt: skip
        with pytest.raises(PlanError):
            ids.check()


def needed_waits(plan: Plan) -> list[tuple[int, int]]:
    """(step, before) pairs that no other path of waits implies, on some rank that takes part in both.

    An independent oracle: reachability by breadth-first search over one rank's steps, edge left out.
    """
    out = []
    for step in plan.steps:
        for before in step.after:
            for rank in set(step.group) & set(plan.steps[before].group):
                seen: set[int] = set()
                todo = [b for b in step.after if b != before]
                while todo:
                    at = todo.pop()
                    if at not in seen and rank in plan.steps[at].group:
                        seen.add(at)
                        todo += plan.steps[at].after
                if before not in seen:
                    out.append((step.id, before))
                    break
    return out


@pytest.mark.parametrize("make", [dense, swapped, *COMPRESSED])
def test_each_missing_wait_is_caught_and_no_harmless_one_flagged(make: Callable[[], Plan]) -> None:
    plan = make()
    needed = set(needed_waits(plan))
    waits = [(step.id, before) for step in plan.steps for before in step.after]
    assert needed
    for place, before in waits:
        after = tuple(b for b in plan.steps[place].after if b != before)
        mutant = changed(plan, place, after=after)
        if (place, before) in needed:
            with pytest.raises(PlanError, match="misses it"):
                mutant.check()
        else:
            mutant.check()


def test_each_missing_wait_of_the_other_collectives_is_caught() -> None:
    for plan in others()[3:]:  # those before have a wait of a reader for a reader, which only orders them
        for place, before in needed_waits(plan):
            after = tuple(b for b in plan.steps[place].after if b != before)
            with pytest.raises(PlanError, match="misses it"):
                changed(plan, place, after=after).check()


def test_messages_from_or_to_the_wrong_rank_are_caught() -> None:
    """Pairs inside a node and between nodes, each turned around, bent to another rank, or widened by one."""
    for plan in others()[4:]:
        for op in ("gather", "exchange_gather"):
            pairs = [step for step in plan.steps if step.op == op and len(step.group) == 2]
            for step in pairs[:1]:
                turned = next(rank for rank in step.group if rank != step.root)
                with pytest.raises(PlanError, match=r"nothing was written|ends with ranks|misses it"):
                    changed(plan, step.id, root=turned).check()
                bent = tuple(rank if rank == step.root else (rank + 1) % 5 for rank in step.group)
                for group in (bent, step.group[::-1], step.group[:1], (*step.group, step.group[-1])):
                    with pytest.raises(PlanError):
                        changed(plan, step.id, group=group).check()


def test_reducing_on_the_wrong_node_or_in_pairs_is_caught() -> None:
    plan = build.reduce(NAMED["3+2"], 9000, root=1, chunk_elems=1024)
    place = find(plan, "exchange_reduce")
    other = next(rank for rank in plan.steps[place].group if rank != plan.steps[place].root)
    with pytest.raises(PlanError, match=r"ends with ranks|counts rank|misses it"):
        changed(plan, place, root=other).check()
    with pytest.raises(PlanError, match="all ranks of one node"):
        changed(plan, find(plan, "reduce"), group=(0, 1), root=1).check()


def test_parts_that_do_not_tile_or_are_not_the_collectives_are_caught() -> None:
    plan = build.gather(NAMED["2x2"], 4000, root=1, chunk_elems=1024)
    first, second, *rest = plan.parts
    for parts, text in (
        ((second, *rest), "must tile"),
        ((first, first, *rest), "must tile"),
        ((first, second), "end at 2000 of 4000"),
        ((), "end at 0"),
        ((first._replace(target=2), second, *rest), "no part of gather"),
        ((first._replace(source=ALL), second, *rest), "no part of gather"),
        ((first._replace(source=7), second, *rest), "no part of gather"),
        ((first._replace(source=2), second, *rest), r"ends with ranks|nothing was written"),
    ):
        with pytest.raises(PlanError, match=text):
            dataclasses.replace(plan, parts=parts).check()
    with pytest.raises(PlanError, match="no part of scatter"):
        dataclasses.replace(plan, collective="scatter").check()


def test_wrong_owner_is_caught() -> None:
    plan = compressed()
    for op in ("reduce", "compress", "decompress", "gather"):
        place = find(plan, op)
        step = plan.steps[place]
        other = next(
            rank
            for rank in range(5)
            if rank != step.root and rank in (step.group if len(step.group) > 1 else (1, 2))
        )
        group = step.group if len(step.group) > 1 else (other,)
        with pytest.raises(PlanError, match=r"does not own shard|shares no rank"):
            changed(plan, place, root=other, group=group).check()


def test_swapped_peers_and_sends_are_caught() -> None:
    whole = swapped()
    place = find(whole, "exchange_reduce_all")
    step = whole.steps[place]
    for fields in ({"group": step.group[::-1]}, {"group": step.group[:1]}, {"root": step.group[0]}):
        with pytest.raises(PlanError):
            changed(whole, place, **fields).check()
    plan = dense()
    place = find(plan, "exchange_reduce")
    step = plan.steps[place]
    for fields in (
        {"group": step.group[::-1]},  # the order of summation, and so the result, would differ
        {"root": next(rank for rank in step.group if rank != step.root)},  # the other owner sums it
        {"group": (step.group[0],)},
        {"group": (0, 1)},  # both on one node
    ):
        with pytest.raises(PlanError):
            changed(plan, place, **fields).check()
    gather = find(plan, "exchange_gather")
    wrong = next(rank for rank in plan.steps[gather].group if rank != plan.steps[gather].root)
    with pytest.raises(PlanError, match=r"ends with ranks|counts rank"):
        changed(plan, gather, root=wrong).check()


def test_overlapping_or_short_slices_are_caught() -> None:
    plan = dense()
    place = find(plan, "exchange_reduce")
    begin, end = plan.steps[place].region
    for region in (Region(begin, end + 16), Region(begin, end - 16), Region(begin + 16, end + 16)):
        with pytest.raises(PlanError):
            changed(plan, place, region=region).check()
    with pytest.raises(PlanError, match="not within"):
        changed(plan, place, region=Region(begin, plan.numel + 1)).check()
    with pytest.raises(PlanError, match="empty"):
        changed(plan, place, region=Region(begin, begin)).check()


def test_averaging_twice_or_never_is_caught() -> None:
    plan = dense()
    with pytest.raises(PlanError, match="adds means to sums"):
        changed(plan, find(plan, "reduce"), divisor=5).check()
    every = [
        dataclasses.replace(s, divisor=5) if s.op in ("reduce", "exchange_reduce") else s for s in plan.steps
    ]
    with pytest.raises(PlanError, match=r"adds means to sums|/ 25"):
        dataclasses.replace(plan, steps=tuple(every)).check()
    with pytest.raises(PlanError, match=r"ends with ranks .* / 1"):
        changed(plan, find(plan, "exchange_reduce"), divisor=1).check()
    with pytest.raises(PlanError, match="divisor 3"):
        changed(plan, find(plan, "exchange_reduce"), divisor=3).check()


def test_cycles_and_order_are_caught() -> None:
    plan = dense()
    first, last = find(plan, "reduce"), find(plan, "gather")
    with pytest.raises(PlanError, match="cycle or wrong order"):
        changed(plan, first, after=(last,)).check()
    turned = list(plan.steps)
    turned[0], turned[1] = turned[1], turned[0]
    with pytest.raises(PlanError, match="places in the global order"):
        dataclasses.replace(plan, steps=tuple(turned)).check()
