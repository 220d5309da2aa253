"""What plans compute, by the interpreter: equality on exact inputs for every topology and size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm import collective_plans as build
from hybridcomm.topology import Topology
from tests.exact import MANTISSA_BITS, exact_ints, exact_sum
from tests.hybridcomm.strategies import NAMED, SIZES, topk, topologies, uneven
from tests.interpreter import Interpreter
from tests.numerics import sum_tolerance, topk_error_bound


def inputs(world: int, numel: int, dtype: str = "float32", call: int = 0) -> list[np.ndarray]:
    return [
        exact_ints(rank=rank, numel=numel, world=world, call=call, dtype=dtype).astype(dtype)
        for rank in range(world)
    ]


@given(world=st.integers(1, 16), numel=st.integers(1, 300), call=st.integers(0, 5))
@settings(deadline=None)
def test_exact_inputs_are_exact_and_distinct(world: int, numel: int, call: int) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        values = [exact_ints(rank=r, numel=numel, world=world, call=call, dtype=dtype) for r in range(world)]
        assert np.abs(values).sum(axis=0).max() < 2 ** MANTISSA_BITS[dtype]
    rows = {
        tuple(exact_ints(rank=r, numel=64, world=world, call=c))
        for r in range(world)
        for c in (call, call + 1)
    }
    assert len(rows) == 2 * world


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_dense_allreduce_is_the_sum_bit_for_bit(name: str, numel: int, dtype: str) -> None:
    topology = NAMED[name]
    world = topology.world_size
    plan = build.allreduce(topology, numel, dtype=dtype, chunk_elems=1024)
    buffers = inputs(world, numel, dtype)
    Interpreter(plan).run(buffers)
    want = exact_sum(numel=numel, world=world, dtype=dtype).astype(dtype)
    for rank, got in enumerate(buffers):
        assert got.tobytes() == want.tobytes(), rank


@given(topology=topologies(), numel=st.integers(0, 3000), chunk=st.sampled_from([16, 64, 1024]))
@settings(max_examples=60)
def test_dense_allreduce_on_random_topologies(topology: Topology, numel: int, chunk: int) -> None:
    world = topology.world_size
    buffers = inputs(world, numel)
    Interpreter(build.allreduce(topology, numel, chunk_elems=chunk)).run(buffers)
    want = exact_sum(numel=numel, world=world).astype(np.float32)
    assert all(got.tobytes() == want.tobytes() for got in buffers)


@given(topology=topologies(), numel=st.integers(1, 3000), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_mean_of_real_numbers_is_within_the_computed_tolerance(
    topology: Topology, numel: int, seed: int
) -> None:
    world = topology.world_size
    rng = np.random.default_rng(seed)
    terms = rng.standard_cauchy((world, numel)).astype(np.float32)
    buffers = [row.copy() for row in terms]
    Interpreter(build.allreduce(topology, numel, op="mean", chunk_elems=64)).run(buffers)
    want = terms.astype(np.float64).sum(axis=0) / world
    tolerance = sum_tolerance(terms.astype(np.float64) / world, "float32", extra=1)
    assert all(np.all(np.abs(got - want) <= tolerance) for got in buffers)
    assert all(got.tobytes() == buffers[0].tobytes() for got in buffers)


@given(topology=topologies(), part=st.integers(0, 700), data=st.data())
@settings(max_examples=40)
def test_broadcast_all_gather_reduce_scatter(topology: Topology, part: int, data: st.DataObject) -> None:
    world = topology.world_size
    root = data.draw(st.integers(0, world - 1))
    sent = inputs(world, part)
    got = [b.copy() for b in sent]
    Interpreter(build.broadcast(topology, part, root=root, chunk_elems=64)).run(got)
    assert all(b.tobytes() == sent[root].tobytes() for b in got)

    full = [np.full(world * part, np.nan, np.float32) for _ in range(world)]
    for rank in range(world):
        full[rank][rank * part : (rank + 1) * part] = sent[rank]
    Interpreter(build.all_gather(topology, world * part, chunk_elems=64)).run(full)
    assert all(b.tobytes() == b"".join(s.tobytes() for s in sent) for b in full)

    every = inputs(world, world * part)
    Interpreter(build.reduce_scatter(topology, world * part, chunk_elems=64)).run(every)
    want = exact_sum(numel=world * part, world=world).astype(np.float32)
    for rank in range(world):
        mine = slice(rank * part, (rank + 1) * part)
        assert every[rank][mine].tobytes() == want[mine].tobytes()


@given(topology=topologies(), part=st.integers(0, 700), data=st.data())
@settings(max_examples=40)
def test_reduce_gather_scatter(topology: Topology, part: int, data: st.DataObject) -> None:
    world = topology.world_size
    root = data.draw(st.integers(0, world - 1))
    got = inputs(world, part)
    Interpreter(build.reduce(topology, part, root=root, chunk_elems=64)).run(got)
    assert got[root].tobytes() == exact_sum(numel=part, world=world).astype(np.float32).tobytes()

    sent = inputs(world, part)
    full = [np.full(world * part, np.nan, np.float32) for _ in range(world)]
    for rank in range(world):
        full[rank][rank * part : (rank + 1) * part] = sent[rank]
    Interpreter(build.gather(topology, world * part, root=root, chunk_elems=64)).run(full)
    assert full[root].tobytes() == b"".join(s.tobytes() for s in sent)

    every = [np.full(world * part, np.nan, np.float32) for _ in range(world)]
    every[root][:] = np.concatenate(sent)
    Interpreter(build.scatter(topology, world * part, root=root, chunk_elems=64)).run(every)
    for rank in range(world):
        assert every[rank][rank * part : (rank + 1) * part].tobytes() == sent[rank].tobytes()


@given(topology=topologies(), data=st.data())
@settings(max_examples=40)
def test_all_to_all_of_any_sizes(topology: Topology, data: st.DataObject) -> None:
    world = topology.world_size
    rows = st.lists(st.sampled_from([0, 1, 17, 200]), min_size=world, max_size=world)
    sizes = [data.draw(rows) for _ in range(world)]
    plan = build.all_to_all(topology, sizes, chunk_elems=64)
    buffers = [np.full(plan.numel, np.nan, np.float32) for _ in range(world)]
    sent = inputs(world, plan.numel)
    for part in plan.parts:
        buffers[part.source][part.begin : part.end] = sent[part.source][part.begin : part.end]
    Interpreter(plan).run(buffers)
    for part in plan.parts:
        want = sent[part.source][part.begin : part.end]
        assert buffers[part.target][part.begin : part.end].tobytes() == want.tobytes()
    assert sum(part.end - part.begin for part in plan.parts) == sum(map(sum, sizes))


@pytest.mark.parametrize("name", NAMED)
def test_each_byte_crosses_a_slow_link_once(name: str) -> None:
    """Only what must: what the interpreter sent between nodes is what `Plan.parts` has on two nodes; reduce, one
    sum per other node.
    """
    topology, numel = NAMED[name], 6000
    world, node_of = topology.world_size, topology.node_of
    for plan in (
        build.gather(topology, world * numel, root=world - 1),
        build.scatter(topology, world * numel, root=0),
        build.all_to_all(topology, uneven(world, numel)),
    ):
        far = sum(p.end - p.begin for p in plan.parts if node_of(p.source) != node_of(p.target))
        interpreter = Interpreter(plan)
        interpreter.run([np.zeros(plan.numel, np.float32) for _ in range(world)])
        assert sum(interpreter.wire_nbytes.values()) == plan.wire_nbytes() == 4 * far
    for n in (6, numel):
        plan = build.reduce(topology, n, root=world - 1)
        assert plan.wire_nbytes() == 4 * n * (len(topology.nodes) - 1)


@pytest.mark.parametrize("name", NAMED)
def test_barrier_sums_one_int64(name: str) -> None:
    buffers = [np.ones(1, np.int64) for _ in range(NAMED[name].world_size)]
    Interpreter(build.barrier(NAMED[name])).run(buffers)
    assert all(b[0] == NAMED[name].world_size for b in buffers)


@pytest.mark.parametrize("name", ["2x2", "4x1", "2+1", "3+2", "2+1+1", "interleaved"])
def test_lossless_compressed_allreduce_is_the_sum(name: str) -> None:
    """k = block and inputs on the codec's grid: what compression keeps is everything, so the sum is exact."""
    topology = NAMED[name]
    world, codec = topology.world_size, topk(1.0, 64)
    half = (1 << (codec.spec.layout[2] - 1)) // (2 * world)
    for numel in (1, 63, 64, 65, 1000, 5003):
        buffers = [(v % half).astype(np.float32) for v in inputs(world, numel)]
        want = np.sum(buffers, axis=0, dtype=np.float32)
        plan = build.allreduce(topology, numel, compressor=codec, chunk_elems=512)
        Interpreter(plan).run(buffers)
        assert all(got.tobytes() == want.tobytes() for got in buffers)


@given(topology=topologies(), numel=st.integers(200, 3000), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_compressed_allreduce_errs_within_two_bounds(topology: Topology, numel: int, seed: int) -> None:
    """Not more than the nodes' codecs may lose together, and more than nothing: compression happened."""
    if len(topology.nodes) == 1:
        return
    world, codec = topology.world_size, topk(0.1, 64)
    block, k, bits = codec.spec.layout
    terms = np.random.default_rng(seed).standard_normal((world, numel)).astype(np.float32)
    buffers = [row.copy() for row in terms]
    Interpreter(build.allreduce(topology, numel, compressor=codec, chunk_elems=256)).run(buffers)
    sums = [terms[list(ranks)].astype(np.float64).sum(axis=0) for ranks in topology.nodes]
    error = float(np.linalg.norm(buffers[0] - np.sum(sums, axis=0)))
    bounds = [topk_error_bound(node, block=block, k=k, value_bits=bits) ** 0.5 for node in sums]
    rounding = float(np.linalg.norm(sum_tolerance(terms, "float32", extra=len(sums))))
    assert 0.0 < error <= sum(bounds) + rounding
    assert all(got.tobytes() == buffers[0].tobytes() for got in buffers)


def test_bytes_between_nodes_are_what_theory_says() -> None:
    """Dense: 2 (M - 1) / M of a bucket per node; compressed: (M - 1) payloads per owner."""
    topology, numel = NAMED["2x2"], 1 << 16
    dense = Interpreter(build.allreduce(topology, numel, chunk_elems=4096))
    dense.run(inputs(4, numel))
    assert [dense.wire_nbytes[r] for r in range(4)] == [numel * 4 // 2] * 4
    codec = topk(0.01, 1024)
    plan = build.allreduce(topology, numel, compressor=codec, chunk_elems=4096)
    sparse = Interpreter(plan)
    sparse.run(inputs(4, numel))
    assert [sparse.wire_nbytes[r] for r in range(4)] == [codec.nbytes(4096) * (numel // 2 // 4096)] * 4


def test_interpreter_notices_a_wrong_plan() -> None:
    """Negative control of this whole file: one swapped root changes the result."""
    plan = build.allreduce(NAMED["2+1+1"], 8192, chunk_elems=1024)
    place = next(step.id for step in plan.steps if step.op == "exchange_gather")
    step = plan.steps[place]
    wrong = dataclasses.replace(step, root=next(r for r in step.group if r != step.root))
    mutant = dataclasses.replace(plan, steps=(*plan.steps[:place], wrong, *plan.steps[place + 1 :]))
    buffers = inputs(4, 8192)
    Interpreter(mutant).run(buffers)
    want = exact_sum(numel=8192, world=4).astype(np.float32)
    assert any(got.tobytes() != want.tobytes() for got in buffers)
