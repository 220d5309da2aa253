"""Builders: the plan of each collective, a pure function of (topology, size, dtype, compressor, policy).

An all-reduce goes through these stages, chunk by chunk; a stage with no peer vanishes:

    small        reduce_all, on a single node
    dense        reduce -> exchange_reduce (one slice per node) -> exchange_gather -> gather
                 reduce -> exchange_reduce_all -> gather, of two nodes or small tensors
    compressed   reduce -> compress -> exchange_payload -> decompress -> gather

With a codec that selects over a whole region only reduce and gather go chunk by chunk; the steps between them are
one a shard, and wait for all of its chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from hybridcomm import policy, reduction
from hybridcomm.copy_plans import (
    all_gather,
    all_to_all,
    broadcast,
    finished,
    gather,
    monitored_barrier,
    parts_by_rank,
    scatter,
)
from hybridcomm.errors import UnsupportedError
from hybridcomm.plan import ALL, Part, Plan, Region
from hybridcomm.plan_stages import (
    Chunk,
    Stage,
    Writer,
    chunk_size,
    chunks_of,
    pipeline,
    regions_of,
    shard_regions,
    whole_shards,
)
from hybridcomm.topology import Topology

__all__ = [
    "all_gather",
    "all_to_all",
    "allreduce",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "reduce",
    "reduce_scatter",
    "scatter",
]


class BlockCodec(Protocol):
    """What a plan needs to know of a compressor; ``str()`` is its canonical text."""

    @property
    def block(self) -> int: ...

    @property
    def whole_region(self) -> bool: ...


def allreduce(
    topology: Topology,
    numel: int,
    *,
    dtype: str = "float32",
    op: str = "sum",
    compressor: BlockCodec | None = None,
    chunk_elems: int | None = None,
    chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
    bucket: int = 0,
    segments: Sequence[int] | None = None,
) -> Plan:
    """``op`` over all ranks' ``numel`` elements, left on all ranks.

    ``segments``: the sizes of several tensors that they consist of; no step reaches over an edge.

    With one node nothing crosses a slow link: the plan is dense whatever ``compressor`` is
    (``plan.compressor`` tells). ``chunk_nbytes`` bounds the chunks that policy chooses (without
    ``chunk_elems``). Raises :class:`UnsupportedError` for an op or dtype that cannot act.
    """
    _check_request(op, dtype, numel, compressor)
    nodes, world = len(topology.nodes), topology.world_size
    codec = compressor if nodes > 1 else None
    align = codec.block if codec is not None else policy.DENSE_ALIGN
    shards = _shards([numel] if segments is None else segments, topology.K, align)
    if codec is not None and codec.whole_region and any(len(regions) > 1 for regions in shards):
        raise UnsupportedError(f"compress={codec} of several tensors in one: its shards must be whole")
    size = chunk_size(
        chunk_elems,
        chunk_nbytes,
        numel=numel,
        dtype=dtype,
        shards=len(shards),
        align=align,
        compressed=codec is not None and not codec.whole_region,
        overlap=nodes > 1,
    )
    writer = Writer(topology, bucket)
    divisor = world if op == "mean" else 1
    one_shot = nodes == 1 < world and chunk_elems is None and segments is None
    one_shot = one_shot and numel * policy.itemsize(dtype) <= min(policy.one_shot_nbytes(world), chunk_nbytes)

    if one_shot:
        size = max(size, numel)
        whole = chunks_of(0, [Region(0, numel)], size, topology.owners(0))
        pipeline([lambda chunk: writer.reduce_all(chunk, divisor)], [whole])
    else:
        chunks = [chunks_of(s, r, size, topology.owners(s)) for s, r in enumerate(shards)]
        at_once = policy.exchange_at_once(nodes, numel * policy.itemsize(dtype))
        _route(writer, chunks, divisor, codec, at_once)
    text = "none" if codec is None else str(codec)
    return finished("allreduce", writer, numel=numel, dtype=dtype, size=size, op=op, compressor=text)


def _route(
    writer: Writer,
    shards: Sequence[Sequence[Chunk]],
    divisor: int,
    codec: BlockCodec | None,
    at_once: bool,
) -> None:
    """Steps 3 to 7 of the chunks of all shards."""
    nodes, stages = len(writer.nodes), list[Stage]()
    if writer.topology.K > 1:
        stages.append(lambda chunk: writer.reduce(chunk, divisor if nodes == 1 else 1))
    if codec is not None and codec.whole_region:
        pipeline(stages, shards)
        whole_shards(writer, shards, divisor)
        stages = []
    elif codec is not None:
        stages += [writer.compress, writer.exchange_payload, lambda chunk: writer.decompress(chunk, divisor)]
    elif nodes > 1 and at_once:
        stages.append(lambda chunk: writer.exchange_reduce_all(chunk, divisor))
    elif nodes > 1:
        stages += [lambda chunk: writer.exchange_reduce(chunk, divisor), writer.exchange_gather]
    if writer.topology.K > 1:
        stages.append(writer.gather)
    pipeline(stages, shards)


def _shards(sizes: Sequence[int], count: int, align: int) -> list[list[Region]]:
    """Shard -> its regions, one of each tensor that is long enough."""
    shards: list[list[Region]] = [[] for _ in range(count)]
    for begin, end in regions_of(sizes):
        for shard, region in zip(shards, shard_regions(end - begin, count, align), strict=False):
            shard.append(Region(begin + region.begin, begin + region.end))
    return [shard for shard in shards if shard]


def barrier(topology: Topology) -> Plan:
    """An all-reduce of one int64."""
    return replace(allreduce(topology, 1, dtype="int64"), collective="barrier")


def reduce(
    topology: Topology,
    numel: int,
    *,
    root: int,
    dtype: str = "float32",
    op: str = "sum",
    chunk_elems: int | None = None,
    chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
) -> Plan:
    """``op`` over all ranks' ``numel`` elements, left on ``root``.

    Each node sends its sums to root's node once, by as many owners as it has. On the other ranks, the regions that
    they own hold partial sums afterwards (`Plan.written_regions`).
    """
    _check_request(op, dtype, numel, None)
    home, world = topology.node_of(root), topology.world_size
    small = numel * policy.itemsize(dtype) <= policy.one_shot_nbytes(world)
    owners = [topology.leaders(root)] if small else [topology.owners(shard) for shard in range(topology.K)]
    shards = shard_regions(numel, len(owners), policy.DENSE_ALIGN)
    size = chunk_size(chunk_elems, chunk_nbytes, numel=numel, dtype=dtype, shards=len(owners))
    writer = Writer(topology, 0)
    divisor = world if op == "mean" else 1

    def exchange(chunk: Chunk) -> None:
        group = chunk.owners
        chunk.ready = (
            writer.add("exchange_reduce", chunk, group, group[home], chunk.ready, divisor=divisor),
        )

    def hand_over(chunk: Chunk) -> None:
        """Also behind the reduce inside root's node, which read root's region."""
        if chunk.owners[home] != root:
            chunk.ready = tuple(sorted({chunk.reduced[home], chunk.ready[-1]}))
            writer.pass_on(chunk, chunk.owners[home], root)

    stages: list[Stage] = []
    if topology.K > 1:
        stages.append(lambda chunk: writer.reduce(chunk, divisor if len(topology.nodes) == 1 else 1))
    if len(topology.nodes) > 1:
        stages.append(exchange)
    if topology.K > 1:
        stages.append(hand_over)
    pipeline(stages, [chunks_of(s, r, size, owners[s]) for s, r in enumerate(shards)])
    parts = (Part(0, numel, ALL, root),) if numel else ()
    return finished("reduce", writer, numel=numel, dtype=dtype, size=size, op=op, root=root, parts=parts)


def reduce_scatter(
    topology: Topology,
    numel: int,
    *,
    dtype: str = "float32",
    op: str = "sum",
    segments: Sequence[Sequence[int]] | None = None,
    chunk_elems: int | None = None,
    chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
) -> Plan:
    """Part r of W parts, reduced over all ranks, ends on rank r; by default ``numel`` is W equal parts.

    ``segments``: sizes by rank of the parts of several tensors, one tensor behind the other. Of the rest of each
    rank's buffer, what it sums for others holds partial sums afterwards (`Plan.written_regions`).
    """
    _check_request(op, dtype, numel, None)
    nodes, world = len(topology.nodes), topology.world_size
    parts = parts_by_rank(topology, numel, segments, "reduce_scatter")
    size = chunk_size(chunk_elems, chunk_nbytes, numel=numel, dtype=dtype, shards=world)
    writer = Writer(topology, 0)
    divisor = world if op == "mean" else 1

    def exchange(chunk: Chunk) -> None:
        group, root = chunk.owners, chunk.owners[topology.node_of(chunk.shard)]
        writer.add("exchange_reduce", chunk, group, root, chunk.ready, divisor=divisor)

    stages: list[Stage] = []
    if topology.K > 1:
        stages.append(lambda chunk: writer.reduce(chunk, divisor if nodes == 1 else 1))
    if nodes > 1:
        stages.append(exchange)
    pipeline(stages, [chunks_of(r, part, size, topology.leaders(r)) for r, part in enumerate(parts)])
    promise = [Part(*region, ALL, rank) for rank, regions in enumerate(parts) for region in regions]
    return finished(
        "reduce_scatter", writer, numel=numel, dtype=dtype, size=size, op=op, parts=sorted(promise)
    )


def _check_request(op: str, dtype: str, numel: int, compressor: BlockCodec | None) -> None:
    policy.itemsize(dtype)
    if numel < 0:
        raise UnsupportedError(f"numel={numel}: must be >= 0")
    reduction.check(op, dtype)
    if compressor is not None and op not in ("sum", "mean"):
        raise UnsupportedError(f"compress={compressor} with op={op!r}: only sums and means can be compressed")
    if compressor is not None and dtype != "float32":
        raise UnsupportedError(f"compress={compressor} of {dtype}: only float32 can be compressed")
