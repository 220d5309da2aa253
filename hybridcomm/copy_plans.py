"""Builders of the collectives that copy and combine nothing; each byte crosses a slow link once per node that wants it.

all_gather                 exchange_gather to one leader per node -> gather inside the nodes
broadcast                  the same; if it is long, chunk by chunk to one leader of several, which sends it on
gather, scatter,           from rank to rank: gather between two ranks of a node,
all_to_all                 exchange_gather between ranks of two nodes
monitored_barrier          every rank to rank 0, then rank 0 to every rank
"""

from __future__ import annotations

from collections.abc import Sequence

from hybridcomm import policy
from hybridcomm.errors import UnsupportedError
from hybridcomm.plan import ALL, Part, Plan, Region
from hybridcomm.plan_pipeline import Stage, pipeline
from hybridcomm.plan_stages import (
    Chunk,
    Writer,
    chunk_size,
    chunks_of,
    equal_parts,
    regions_of,
)
from hybridcomm.topology import Topology

__all__ = [
    "all_gather",
    "all_to_all",
    "broadcast",
    "finished",
    "gather",
    "monitored_barrier",
    "parts_by_rank",
    "scatter",
]


def broadcast(
    topology: Topology,
    numel: int,
    *,
    root: int,
    dtype: str = "float32",
    chunk_elems: int | None = None,
    chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
) -> Plan:
    """Copies ``root``'s ``numel`` elements to all ranks: to one leader per node, then inside the nodes.

    Sent to every node, they would take root's way out that many times. So where they are long, each chunk goes to one
    of the other leaders, in turn, which sends it on: all ways out are used, and root's once.
    """
    leaders, home = topology.leaders(root), topology.node_of(root)
    others = len(topology.nodes) - 1
    relayed = others > 1 and policy.is_relayed(numel * policy.itemsize(dtype))
    size = chunk_size(chunk_elems, chunk_nbytes, numel=numel, dtype=dtype, shards=others if relayed else 1)
    chunks = chunks_of(0, Region(0, numel), size, leaders)
    parts = [Part(0, numel, root, ALL)] if numel else []
    writer = _relay(topology, chunks, home) if relayed else _copy_out(topology, [chunks], [home])
    return finished("broadcast", writer, numel=numel, dtype=dtype, size=size, root=root, parts=parts)


def all_gather(
    topology: Topology,
    numel: int,
    *,
    dtype: str = "float32",
    segments: Sequence[Sequence[int]] | None = None,
    chunk_elems: int | None = None,
    chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
) -> Plan:
    """Part r of W parts goes from rank r to all ranks; by default ``numel`` is W equal parts.

    ``segments``: sizes by rank of the parts of several tensors, one tensor behind the other.
    """
    parts = parts_by_rank(topology, numel, segments, "all_gather")
    size = chunk_size(chunk_elems, chunk_nbytes, numel=numel, dtype=dtype, shards=topology.world_size)
    chunks = [chunks_of(rank, part, size, topology.leaders(rank)) for rank, part in enumerate(parts)]
    homes = [topology.node_of(rank) for rank in range(topology.world_size)]
    writer = _copy_out(topology, chunks, homes)
    promise = [Part(*region, rank, ALL) for rank, regions in enumerate(parts) for region in regions]
    return finished("all_gather", writer, numel=numel, dtype=dtype, size=size, parts=sorted(promise))


def gather(
    topology: Topology,
    numel: int,
    *,
    root: int,
    dtype: str = "float32",
    chunk_elems: int | None = None,
    chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
) -> Plan:
    """Part r of W equal parts goes from rank r to ``root``; ``numel`` is W * part."""
    topology.node_of(root)  # raises for a rank that is not there
    regions = regions_of(equal_parts(topology, numel, "gather"))
    parts = [Part(*region, rank, root) for rank, region in enumerate(regions)]
    limits = (chunk_elems, chunk_nbytes)
    return _from_rank_to_rank("gather", topology, parts, numel=numel, dtype=dtype, root=root, limits=limits)


def scatter(
    topology: Topology,
    numel: int,
    *,
    root: int,
    dtype: str = "float32",
    chunk_elems: int | None = None,
    chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
) -> Plan:
    """Part r of W equal parts goes from ``root`` to rank r; ``numel`` is W * part."""
    topology.node_of(root)
    regions = regions_of(equal_parts(topology, numel, "scatter"))
    parts = [Part(*region, root, rank) for rank, region in enumerate(regions)]
    limits = (chunk_elems, chunk_nbytes)
    return _from_rank_to_rank("scatter", topology, parts, numel=numel, dtype=dtype, root=root, limits=limits)


def all_to_all(
    topology: Topology,
    sizes: Sequence[Sequence[int]],
    *,
    dtype: str = "float32",
    chunk_elems: int | None = None,
    chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
) -> Plan:
    """``sizes[i][j]`` elements go from rank i to rank j; they lie one behind the other, by i, then by j."""
    world = topology.world_size
    if len(sizes) != world or any(len(row) != world for row in sizes):
        raise UnsupportedError(f"all_to_all: sizes must be {world} rows of {world}, by sender and receiver")
    regions = iter(regions_of([size for row in sizes for size in row]))
    parts = [Part(*next(regions), i, j) for i in range(world) for j in range(world)]
    limits, numel = (chunk_elems, chunk_nbytes), sum(map(sum, sizes))
    return _from_rank_to_rank("all_to_all", topology, parts, numel=numel, dtype=dtype, limits=limits)


def monitored_barrier(topology: Topology) -> Plan:
    """A byte from every rank to rank 0, which so knows who has come; then all of them to every rank."""
    world = topology.world_size
    writer = Writer(topology, 0)
    parts = [Part(rank, rank + 1, rank, ALL) for rank in range(world)]
    arrived: list[int] = []
    for rank in range(1, world):
        chunk = Chunk(rank, 0, Region(rank, rank + 1), ())
        writer.pass_on(chunk, rank, 0)
        arrived += chunk.ready
    for rank in range(1, world):
        chunk = Chunk(rank, 1, Region(0, world), ())
        chunk.ready = tuple(arrived)
        writer.pass_on(chunk, 0, rank)
    return finished("monitored_barrier", writer, numel=world, dtype="uint8", size=world, parts=parts)


def _copy_out(topology: Topology, chunks: list[list[Chunk]], homes: Sequence[int]) -> Writer:
    """Chunks of part p start at the leader of node ``homes[p]`` and end on all ranks."""
    writer = Writer(topology, 0)

    def exchange(chunk: Chunk) -> None:
        root = chunk.owners[homes[chunk.shard]]
        chunk.ready = (writer.add("exchange_gather", chunk, chunk.owners, root),)

    stages: list[Stage] = [exchange] if len(topology.nodes) > 1 else []
    if topology.K > 1:
        stages.append(writer.gather)
    pipeline(stages, chunks)
    return writer


def _relay(topology: Topology, chunks: list[Chunk], home: int) -> Writer:
    """Each chunk from the leader of node ``home`` to another, in turn, and from that to those that are left."""
    writer = Writer(topology, 0)
    away = [node for node in range(len(topology.nodes)) if node != home]

    def relay_of(chunk: Chunk) -> int:
        return chunk.owners[away[chunk.index % len(away)]]

    def send(chunk: Chunk) -> None:
        writer.pass_on(chunk, chunk.owners[home], relay_of(chunk))

    def send_on(chunk: Chunk) -> None:
        group = tuple(chunk.owners[node] for node in away)
        chunk.ready += (writer.add("exchange_gather", chunk, group, relay_of(chunk), chunk.ready),)

    def gather(chunk: Chunk) -> None:
        sent, sent_on = chunk.ready
        for node, ranks in enumerate(topology.nodes):
            if len(ranks) > 1:
                root = chunk.owners[node]
                after = () if node == home else (sent,) if root == relay_of(chunk) else (sent_on,)
                writer.add("gather", chunk, ranks, root, after)

    pipeline([send, send_on, gather] if topology.K > 1 else [send, send_on], [chunks])
    return writer


def _from_rank_to_rank(
    collective: str,
    topology: Topology,
    parts: Sequence[Part],
    *,
    numel: int,
    dtype: str,
    limits: tuple[int | None, int],
    root: int = -1,
) -> Plan:
    """Each part in chunks from its source to its target; where they are one rank it is there already.

    Those of one distance take turns, so that a rank sends to all others alike and no two crowd one receiver.
    """
    world = topology.world_size
    size = chunk_size(*limits, numel=numel, dtype=dtype, shards=max(len(parts), 1), overlap=False)
    moving = [part for part in parts if part.source != part.target]
    moving.sort(key=lambda part: ((part.target - part.source) % world, part.source))
    writer = Writer(topology, 0)
    pipeline(
        [lambda chunk: writer.pass_on(chunk, moving[chunk.shard].source, moving[chunk.shard].target)],
        [chunks_of(i, Region(part.begin, part.end), size) for i, part in enumerate(moving)],
    )
    return finished(collective, writer, numel=numel, dtype=dtype, size=size, root=root, parts=parts)


def parts_by_rank(
    topology: Topology, numel: int, segments: Sequence[Sequence[int]] | None, collective: str
) -> list[list[Region]]:
    """Which regions make up each rank's part, one per segment."""
    sizes = [equal_parts(topology, numel, collective)] if segments is None else segments
    if any(len(row) != topology.world_size for row in sizes) or sum(map(sum, sizes)) != numel:
        raise UnsupportedError(
            f"{collective}: segments must hold {topology.world_size} sizes each, {numel} elements in all"
        )
    regions = regions_of([size for row in sizes for size in row])
    return [regions[rank :: topology.world_size] for rank in range(topology.world_size)]


def finished(
    collective: str,
    writer: Writer,
    *,
    numel: int,
    dtype: str,
    size: int,
    op: str = "none",
    compressor: str = "none",
    root: int = -1,
    parts: Sequence[Part] = (),
) -> Plan:
    """The plan of all steps written; empty parts are left out."""
    return Plan(
        collective=collective,
        numel=numel,
        dtype=dtype,
        op=op,
        compressor=compressor,
        topology=writer.topology.without_links(),
        chunk_elems=size,
        steps=tuple(writer.steps),
        root=root,
        parts=tuple(part for part in parts if part.end > part.begin),
    )
