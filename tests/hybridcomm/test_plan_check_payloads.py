"""Plans of compressed exchanges: what may be whole, second payloads, payloads inside a node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from hybridcomm.errors import PlanError
from hybridcomm.plan import Plan, Region
from tests.hybridcomm.plan_mutants import (
    both_links,
    changed,
    compressed,
    find,
    renumbered,
    two_stage,
    whole,
    whole_slices,
)
from tests.hybridcomm.strategies import gtopk


def test_a_shard_that_needs_to_be_whole_is_compressed_once_after_all_of_its_chunks() -> None:
    plan = whole()
    for shard in range(plan.topology.K):
        steps = [step for step in plan.steps if step.shard == shard]
        chunks = [
            step for step in steps if step.op == "reduce" and step.root == plan.topology.owners(shard)[0]
        ]
        made = [step for step in steps if step.op == "compress" and step.root == chunks[0].root]
        assert len(chunks) > 1
        assert len(made) == 1
        assert made[0].after == tuple(step.id for step in chunks)
        assert made[0].region == Region(chunks[0].region.begin, chunks[-1].region.end)


def test_a_slice_that_needs_to_be_whole_is_encoded_once_by_each_node_and_once_by_its_owner() -> None:
    plan = whole_slices()
    passed = [step for step in plan.steps if step.op == "exchange_recompressed"]
    for step in passed:
        for op, times in (("compress", 3), ("recompress", 1)):
            assert [s.region for s in plan.steps if s.op == op and s.region == step.region] == [
                step.region
            ] * times
    assert len(passed) == len({(step.shard, step.root) for step in passed})
    assert sum(step.region.numel for step in passed) == plan.numel
    assert sum(step.op == "reduce" for step in plan.steps) > len(passed)  # chunk by chunk


@pytest.mark.parametrize("make", [compressed, two_stage])
def test_control_a_shard_or_slice_cut_in_chunks_is_refused(make: Callable[[], Plan]) -> None:
    """The plan of a block-wise codec under the name of one that needs whole regions."""
    with pytest.raises(PlanError, match="needs whole"):
        dataclasses.replace(make(), compressor=str(gtopk())).check()


def test_control_what_a_rank_offers_inside_a_node_cut_in_chunks_is_refused() -> None:
    with pytest.raises(PlanError, match="needs whole"):
        dataclasses.replace(both_links(), intra_compressor=str(gtopk())).check()


def test_faults_of_two_stages_are_caught() -> None:
    plan = two_stage()
    owns, passes = find(plan, "recompress"), find(plan, "exchange_recompressed")
    step = plan.steps[owns]
    other = next(rank for rank in plan.steps[passes].group if rank != step.root)
    kept = [
        s for s in plan.steps if not (s.op == "decompress" and (s.region, s.root) == (step.region, step.root))
    ]
    for mutant, why in (
        # the slice's owner keeps its exact sum, which no other rank has
        (renumbered(plan, kept), r"nothing was written to|ends with ranks \[\]"),
        (changed(plan, owns, root=other, group=(other,)), "misses it|no second payload|no payloads"),
        (changed(plan, passes, root=other), "misses it|counts rank|ends with ranks"),
        (changed(plan, passes, root=-1), "needs a root"),
        (changed(plan, owns, divisor=6), "ends with ranks .* / 36|adds means to sums"),  # applied twice
        (changed(plan, find(plan, "exchange_payload"), root=other), "counts rank|ends with ranks|misses it"),
    ):
        with pytest.raises(PlanError, match=why):
            mutant.check()


def test_faults_of_compression_inside_a_node_are_caught() -> None:
    plan = both_links()
    offers, adds = find(plan, "compress_intra"), find(plan, "reduce_payload")
    step = plan.steps[adds]
    other = next(rank for rank in step.group if rank != step.root)
    for mutant, why in (
        (changed(plan, offers, root=step.root, group=(step.root,)), "no fresh payload|shares no rank"),
        (changed(plan, adds, root=other), "does not own shard"),
        (changed(plan, adds, group=step.group[:-1]), "all ranks of one node"),
        (changed(plan, adds, divisor=6), "adds means to sums|/ 36"),
    ):
        with pytest.raises(PlanError, match=why):
            mutant.check()
