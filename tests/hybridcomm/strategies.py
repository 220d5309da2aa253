"""Topologies, sizes and plans that the tests of this folder run over."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from hybridcomm import collective_plans
from hybridcomm.compress import Compressor, resolve
from hybridcomm.plan import Plan
from hybridcomm.topology import Topology

NAMED = {
    "1x1": Topology.virtual(1, 1),
    "1x4": Topology.virtual(1, 4),
    "2x2": Topology.virtual(2, 2),
    "4x1": Topology.virtual(4, 1),
    "2+1": Topology.from_sizes([2, 1]),
    "3+2": Topology.from_sizes([3, 2]),
    "2+1+1": Topology.from_sizes([2, 1, 1]),
    "3x1": Topology.virtual(3, 1),
    "interleaved": Topology(nodes=((0, 2, 3), (1, 4))),
}

SIZES = (0, 1, 2, 15, 16, 17, 97, 1023, 1025, 4096, 40_009)
"""Empty, single, around alignment and block edges, primes, and several chunks of each shard."""


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Up to 4 nodes of up to 4 ranks, ranks dealt out in any order."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    ranks = draw(st.permutations(range(sum(sizes))))
    nodes, begin = [], 0
    for size in sizes:
        nodes.append(tuple(sorted(ranks[begin : begin + size])))
        begin += size
    return Topology(nodes=tuple(sorted(nodes)))


def topk(ratio: float = 0.1, block: int = 64) -> Compressor:
    compressor = resolve(f"topk:{ratio}/b{block}")
    assert compressor is not None
    return compressor


def gtopk() -> Compressor:
    """A codec that takes each shard whole."""
    compressor = resolve("gtopk:0.1/b64")
    assert compressor is not None
    return compressor


def two_stage(topology: Topology, numel: int, **options: Any) -> Plan:
    """A compressed all-reduce that is exchanged in two stages, or as ``options`` say."""
    return collective_plans.allreduce(
        topology, numel, **{"compressor": topk(), "exchange": "two_stage", **options}
    )


def every_plan(topology: Topology, numel: int) -> list[Plan]:
    """One plan of each builder (numel rounded up to parts where parts must be equal), with several chunks."""
    world = topology.world_size
    parts = -(-numel // world) * world
    plans = [
        collective_plans.allreduce(topology, numel, op=op, compressor=compressor, chunk_elems=1024)
        for op in ("sum", "mean")
        for compressor in (None, topk(), gtopk())
    ]
    plans += [
        collective_plans.allreduce(
            topology, numel, op=op, compressor=compressor, exchange="two_stage", chunk_elems=1024
        )
        for op in ("sum", "mean")
        for compressor in (topk(), gtopk())
    ]
    plans += [
        collective_plans.allreduce(topology, numel, op="mean", intra=codec, chunk_elems=1024)
        for codec in (topk(), gtopk())
    ]
    plans += [
        two_stage(topology, numel, compressor=codec, intra=intra, chunk_elems=1024)
        for codec, intra in (
            (topk(), topk(0.2, 128)),
            (gtopk(), topk()),
            (topk(), gtopk()),
            (gtopk(), gtopk()),
        )
    ]
    plans += [
        collective_plans.broadcast(topology, numel, root=world - 1, chunk_elems=1024),
        collective_plans.all_gather(topology, parts, chunk_elems=1024),
        collective_plans.reduce_scatter(topology, parts, op="mean", chunk_elems=1024),
        collective_plans.barrier(topology),
        collective_plans.allreduce(topology, numel + 103, segments=[numel, 3, 100], chunk_elems=1024),
        collective_plans.reduce(topology, numel, root=0, op="mean", chunk_elems=1024),
        collective_plans.gather(topology, parts, root=world - 1, chunk_elems=1024),
        collective_plans.scatter(topology, parts, root=0, chunk_elems=1024),
        collective_plans.all_to_all(topology, uneven(world, numel), chunk_elems=1024),
        collective_plans.monitored_barrier(topology),
    ]
    for build in (collective_plans.all_gather, collective_plans.reduce_scatter):
        sizes = uneven(max(world, 2), numel)[:2]
        sizes = [row[:world] for row in sizes]
        plans.append(build(topology, sum(map(sum, sizes)), segments=sizes, chunk_elems=1024))
    return plans


def uneven(world: int, numel: int) -> list[list[int]]:
    """``world`` times ``world`` sizes from 0 to ``numel``, about half of them zero."""
    return [
        [(7 * i + 3 * j + numel) % (numel + 1) if (i + j) % 2 else 0 for j in range(world)]
        for i in range(world)
    ]
