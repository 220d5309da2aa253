from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm import collective_plans as build
from hybridcomm import policy
from hybridcomm.errors import DataTypeError, PlanError, TopologyError, UnsupportedError
from hybridcomm.plan import WORDS, Plan
from hybridcomm.plan_stages import shard_regions
from hybridcomm.topology import Topology
from tests.hybridcomm.strategies import NAMED, every_plan, topk, topologies


@given(topology=topologies(), numel=st.integers(0, 5000))
@settings(max_examples=40)
def test_text_round_trips_and_keeps_the_digest(topology: Topology, numel: int) -> None:
    for plan in every_plan(topology, numel):
        again = Plan.parse(str(plan))
        assert again == plan
        assert again.digest == plan.digest
        assert 0 <= plan.digest < 2**64


def test_text_holds_the_seven_words() -> None:
    text = str(build.allreduce(NAMED["2x2"], 10_000, compressor=topk()))
    assert all(word in text for word in WORDS)


def test_digest_differs_when_anything_differs() -> None:
    topology, codec = NAMED["2x2"], topk()
    plans = [
        build.allreduce(topology, 4096),
        build.allreduce(topology, 4097),
        build.allreduce(topology, 4096, op="mean"),
        build.allreduce(topology, 4096, dtype="bfloat16"),
        build.allreduce(topology, 4096, dtype="float16"),
        build.allreduce(topology, 4096, chunk_elems=512),
        build.allreduce(topology, 4096, bucket=1),
        build.allreduce(topology, 4096, compressor=codec),
        build.allreduce(topology, 4096, compressor=topk(0.2)),
        build.allreduce(topology, 4096, compressor=topk(0.1, 128)),
        build.allreduce(Topology.from_sizes([3, 1]), 4096),
        build.allreduce(NAMED["4x1"], 4096),
        build.broadcast(topology, 4096, root=0),
        build.broadcast(topology, 4096, root=1),
        build.all_gather(topology, 4096),
        build.reduce_scatter(topology, 4096),
        build.barrier(topology),
        build.allreduce(topology, 1, dtype="int64"),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)


def test_digest_sees_every_field_of_a_step() -> None:
    plan = build.allreduce(NAMED["2x2"], 4096, op="mean")
    step = plan.steps[-1]
    changes = {
        "id": 999,
        "op": "reduce",
        "bucket": 9,
        "shard": 9,
        "chunk": 9,
        "region": type(step.region)(0, 1),
        "group": (0,),
        "root": 2,
        "divisor": 9,
        "after": (),
    }
    assert set(changes) == {field.name for field in dataclasses.fields(step)}
    for name, value in changes.items():
        changed = dataclasses.replace(step, **{name: value})
        assert changed != step, name
        other = dataclasses.replace(plan, steps=(*plan.steps[:-1], changed))
        assert other.digest != plan.digest, name


def test_digest_is_the_same_in_another_process() -> None:
    code = (
        "from hybridcomm.collective_plans import allreduce\n"
        "from hybridcomm.topology import Topology\n"
        "print(allreduce(Topology.from_sizes([3, 2]), 40_009, op='mean').digest)"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(other.stdout) == build.allreduce(NAMED["3+2"], 40_009, op="mean").digest


@given(topology=topologies(), numel=st.integers(0, 5000))
@settings(max_examples=40)
def test_for_rank_is_the_global_order_seen_by_one_rank(topology: Topology, numel: int) -> None:
    for plan in every_plan(topology, numel):
        for rank in range(topology.world_size):
            assert plan.for_rank(rank) == tuple(step for step in plan.steps if rank in step.group)


@given(topology=topologies(), numel=st.integers(1, 5000))
@settings(max_examples=40)
def test_residuals_of_a_node_cover_the_bucket_once(topology: Topology, numel: int) -> None:
    plan = build.allreduce(topology, numel, compressor=topk(), chunk_elems=256)
    for ranks in topology.nodes:
        regions = sorted(region for rank in ranks for region in plan.residual_regions(rank))
        if len(topology.nodes) == 1:
            assert regions == []
            continue
        assert regions[0].begin == 0
        assert regions[-1].end == numel
        assert all(left.end == right.begin for left, right in pairwise(regions))


@given(numel=st.integers(0, 10_000), shards=st.integers(1, 9), align=st.sampled_from([16, 64, 1024]))
def test_shards_are_even_aligned_and_never_empty(numel: int, shards: int, align: int) -> None:
    regions = shard_regions(numel, shards, align)
    assert sum(region.numel for region in regions) == numel
    assert len(regions) == min(shards, -(-numel // align))
    assert all(region.numel > 0 and region.begin % align == 0 for region in regions)
    sizes = [region.numel for region in regions]
    assert max(sizes, default=0) - min(sizes, default=0) < 2 * align


def test_steps_with_no_peer_vanish() -> None:
    def streams(plan: Plan) -> set[str]:
        return {step.stream for step in plan.steps}

    assert streams(build.allreduce(NAMED["1x4"], 5000, compressor=topk())) == {"reduce", "gather"}
    assert build.allreduce(NAMED["1x4"], 5000, compressor=topk()).compressor == "none"
    assert streams(build.allreduce(NAMED["4x1"], 5000)) == {"exchange"}
    two = {step.op for step in build.allreduce(NAMED["2x2"], 50_000).steps}
    assert two == {"reduce", "exchange_reduce_all", "gather"}
    assert {step.op for step in build.allreduce(NAMED["4x1"], 500).steps} == {"exchange_reduce_all"}
    assert streams(build.allreduce(NAMED["4x1"], 5000, compressor=topk())) == {
        "compress",
        "exchange",
        "decompress",
    }
    assert not build.allreduce(NAMED["1x1"], 5000, op="mean").steps
    assert not build.allreduce(NAMED["2x2"], 0).steps


def test_chunks_interleave_shards_and_stages() -> None:
    """The exchange of the first chunk stands before the reduce of the last one, and shards take turns."""
    plan = build.allreduce(NAMED["2x2"], 1 << 16, chunk_elems=1024)
    first_exchange = next(step.id for step in plan.steps if step.stream == "exchange")
    last_reduce = max(step.id for step in plan.steps if step.op == "reduce")
    assert first_exchange < last_reduce // 4
    reduces = [step for step in plan.steps if step.op == "reduce" and step.group == (0, 1)]
    assert [step.shard for step in reduces] == [0, 1] * (len(reduces) // 2)


def test_parse_names_the_line() -> None:
    text = str(build.allreduce(NAMED["2x2"], 4096))
    lines = text.splitlines()
    for broken, match in (
        ("", "line 1"),
        (text.replace("numel=", "size="), "line 1"),
        (text.replace("topology 0,1|2,3", "topology 0,1|9"), "lines 1-2"),
        (text.replace(" reduce ", " reducer ", 1), "line 4"),
        ("\n".join(lines[:-1]), "were lines lost"),
    ):
        with pytest.raises(PlanError, match=match):
            Plan.parse(broken)


def test_requests_that_cannot_act_are_refused() -> None:
    topology = NAMED["2x2"]
    for call, error in (
        (lambda: build.allreduce(topology, 8, op="median"), UnsupportedError),
        (lambda: build.allreduce(topology, 8, op="max", compressor=topk()), UnsupportedError),
        (lambda: build.allreduce(topology, 8, op="band"), UnsupportedError),
        (lambda: build.allreduce(topology, 8, dtype="int64", op="mean"), UnsupportedError),
        (lambda: build.allreduce(topology, 8, dtype="uint16"), DataTypeError),
        (lambda: build.allreduce(topology, 8, dtype="bfloat16", compressor=topk()), UnsupportedError),
        (lambda: build.allreduce(topology, -1), UnsupportedError),
        (lambda: build.allreduce(topology, 8, chunk_elems=7), UnsupportedError),
        (lambda: build.all_gather(topology, 7), UnsupportedError),
        (lambda: build.reduce_scatter(topology, 7), UnsupportedError),
        (lambda: build.broadcast(topology, 8, root=4), TopologyError),
    ):
        with pytest.raises(error):
            call()


@given(numel=st.integers(0, 1 << 28), shards=st.integers(1, 64), dtype=st.sampled_from(list(policy.ITEMSIZE)))
def test_chunk_size_is_aligned_and_bounded(numel: int, shards: int, dtype: str) -> None:
    size = policy.chunk_elems(numel=numel, dtype=dtype, shards=shards, align=64)
    assert size % 64 == 0
    assert policy.MIN_CHUNK_NBYTES <= size * policy.itemsize(dtype) <= policy.MAX_CHUNK_NBYTES


def test_large_plans_build_in_linear_time() -> None:
    """64 MiB at 2x2 within the budget of 20 ms, best of five (a shared machine may pause one)."""

    def seconds() -> float:
        begin = time.perf_counter()
        plan = build.allreduce(NAMED["2x2"], 1 << 24, op="mean", compressor=topk(0.01, 1024))
        plan.for_rank(0)
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(5)) < 0.020
