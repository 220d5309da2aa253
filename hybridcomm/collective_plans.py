"""Builders: the plan of each collective, a pure function of (topology, size, dtype, compressor, policy).

An all-reduce goes through the stages of its `Route`, chunk by chunk; a small one on a single node takes one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import lcm
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
from hybridcomm.plan import ALL, Part, Plan, Region, Step
from hybridcomm.plan_pipeline import Stage, on_all_nodes, pipeline
from hybridcomm.plan_routes import Route
from hybridcomm.plan_stages import (
    Chunk,
    Writer,
    chunk_size,
    chunks_of,
    regions_of,
    shard_regions,
)
from hybridcomm.topology import Topology

__all__ = [
    "all_gather",
    "all_to_all",
    "allreduce",
    "allreduce_flat",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "reduce",
    "reduce_scatter",
    "scatter",
]


class BlockCodec(Protocol):
    """What a plan needs to know of a compressor: block and payload sizes and, as ``str()``, its canonical text."""

    @property
    def block(self) -> int: ...

    @property
    def whole_region(self) -> bool: ...

    def nbytes(self, numel: int) -> int: ...


def allreduce(
    topology: Topology,
    numel: int,
    *,
    dtype: str = "float32",
    op: str = "sum",
    compressor: BlockCodec | None = None,
    intra: BlockCodec | None = None,
    exchange: str = "auto",
    chunk_elems: int | None = None,
    chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
    bucket: int = 0,
    segments: Sequence[int] | None = None,
) -> Plan:
    """``op`` over all ranks' ``numel`` elements, left on all ranks.

    ``segments``: the sizes of several tensors that they consist of; no step reaches over an edge.

    With one node nothing crosses a slow link: the plan is dense whatever ``compressor`` is
    (``plan.compressor`` tells). ``intra`` compresses what the ranks of a node send to its owners, likewise
    (``plan.intra_compressor``); what owners hand back is dense. ``exchange``: how payloads are exchanged,
    "gather", "two_stage" or "auto" (`policy.exchange`, by ``topology``'s links where they were measured).
    ``chunk_nbytes`` bounds the chunks that policy chooses (without ``chunk_elems``). Raises
    :class:`UnsupportedError` for an op, a dtype or an exchange that cannot act.
    """
    _check_request(op, dtype, numel, compressor)
    _check_request(op, dtype, numel, intra)
    nodes, world = len(topology.nodes), topology.world_size
    codec, intra = compressor if nodes > 1 else None, intra if topology.K > 1 else None
    way = _exchange(topology, numel, compressor, exchange)
    align = lcm(*(c.block for c in (codec, intra) if c is not None)) if codec or intra else policy.DENSE_ALIGN
    shards = _shards([numel] if segments is None else segments, topology.K, align)
    size = chunk_size(
        chunk_elems,
        chunk_nbytes,
        numel=numel,
        dtype=dtype,
        shards=len(shards),
        align=align,
        compressed=any(c is not None and not c.whole_region for c in (codec, intra)),
        overlap=nodes > 1,
    )
    whole = (codec is not None and codec.whole_region, intra is not None and intra.whole_region)
    for each in (codec, intra):
        if each is not None and each.whole_region and any(len(regions) > 1 for regions in shards):
            raise UnsupportedError(f"compress={each} of several tensors in one: its shards must be whole")
    one_shot = intra is None and chunk_elems is None and segments is None
    one_shot = one_shot and _one_shot(topology, numel, dtype, chunk_nbytes)
    if one_shot:
        shards, size = [[Region(0, numel)]], max(size, numel)
    writer, divisor = Writer(topology, bucket), world if op == "mean" else 1
    link, nbytes = topology.inter_node, numel * policy.itemsize(dtype)
    if way == "none" and policy.exchange_at_once(nodes, nbytes, alpha=link.alpha, beta=link.beta):
        way = "at_once"
    route = Route(divisor=divisor, one_shot=one_shot, intra=intra is not None, exchange=way, whole=whole)
    route.write(writer, shards, size=size, align=align)
    _check_slot(intra, writer.steps, chunk_nbytes)
    text, intra_text = ("none" if each is None else str(each) for each in (codec, intra))
    plan = finished("allreduce", writer, numel=numel, dtype=dtype, size=size, op=op, compressor=text)
    return replace(plan, intra_compressor=intra_text)


def _shards(sizes: Sequence[int], count: int, align: int) -> list[list[Region]]:
    """Shard -> its regions, one of each tensor that is long enough."""
    shards: list[list[Region]] = [[] for _ in range(count)]
    for begin, end in regions_of(sizes):
        for shard, region in zip(shards, shard_regions(end - begin, count, align), strict=False):
            shard.append(Region(begin + region.begin, begin + region.end))
    return [shard for shard in shards if shard]


def allreduce_flat(topology: Topology, numel: int, *, dtype: str = "float32", op: str = "sum") -> Plan:
    """``op`` over all ranks' elements in one step, by an algorithm of NCCL's; for GPUs alone."""
    _check_request(op, dtype, numel, None)
    writer, divisor = Writer(topology, 0), topology.world_size if op == "mean" else 1
    if numel:
        world = tuple(range(topology.world_size))
        writer.add("allreduce_flat", Chunk(0, 0, Region(0, numel), world), world, -1, divisor=divisor)
    return finished("allreduce", writer, numel=numel, dtype=dtype, size=max(numel, 1), op=op)


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
            chunk.ready = tuple(sorted({*chunk.reduced[home], chunk.ready[-1]}))
            writer.pass_on(chunk, chunk.owners[home], root)

    stages: list[Stage] = []
    if topology.K > 1:
        last = divisor if len(topology.nodes) == 1 else 1
        stages.append(on_all_nodes(lambda chunk, node: writer.reduce_on(chunk, node, last)))
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
        last = divisor if nodes == 1 else 1
        stages.append(on_all_nodes(lambda chunk, node: writer.reduce_on(chunk, node, last)))
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


def _check_slot(intra: BlockCodec | None, steps: Sequence[Step], slot_nbytes: int) -> None:
    if intra is None:
        return
    largest = max((step.region.numel for step in steps if step.op == "compress_intra"), default=0)
    if intra.nbytes(largest) > slot_nbytes:
        raise UnsupportedError(
            f"intra_node={intra}: the payload of {largest} elements has {intra.nbytes(largest)} bytes, a slot of the "
            f"shared memory {slot_nbytes}; raise chunk_nbytes= of init(), or leave the node dense"
        )


def _one_shot(topology: Topology, numel: int, dtype: str, chunk_nbytes: int) -> bool:
    limit = min(policy.one_shot_nbytes(topology.world_size), chunk_nbytes)
    alone = len(topology.nodes) == 1 < topology.world_size
    return alone and numel * policy.itemsize(dtype) <= limit


def _exchange(topology: Topology, numel: int, compressor: BlockCodec | None, asked: str) -> str:
    """ "gather" or "two_stage" for what was ``asked``; "none" where no payload is exchanged."""
    if asked not in policy.EXCHANGES:
        raise UnsupportedError(f"exchange={asked!r}: choose one of {', '.join(policy.EXCHANGES)}")
    if compressor is None:
        if asked != "auto":
            raise UnsupportedError(f"exchange={asked!r} needs compress=: a dense exchange has no payloads")
        return "none"
    if len(topology.nodes) == 1:
        return "none"
    if asked != "auto":
        return asked
    link = topology.inter_node
    return policy.exchange(
        nodes=len(topology.nodes),
        payload_nbytes=compressor.nbytes(numel),
        shard_numel=-(-numel // topology.K),
        alpha=link.alpha,
        beta=link.beta,
    )
