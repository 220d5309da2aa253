"""Builders: the plan of each collective, a pure function of (topology, size, dtype, compressor, policy).

An all-reduce goes through the stages of its `Route`, chunk by chunk; a small one on a single node takes one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import lcm
from typing import Protocol

from hybridcomm import policy, reduction
from hybridcomm.errors import UnsupportedError
from hybridcomm.plan import Plan, Region
from hybridcomm.plan_routes import Route
from hybridcomm.plan_stages import Chunk, Stage, Writer, chunks_of, on_all_nodes, pipeline, shard_regions
from hybridcomm.topology import Topology

__all__ = ["all_gather", "allreduce", "barrier", "broadcast", "reduce_scatter"]


class BlockCodec(Protocol):
    """What a plan needs to know of a compressor: block and payload sizes and, as ``str()``, its canonical text."""

    @property
    def block(self) -> int: ...

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
) -> Plan:
    """``op`` over all ranks' ``numel`` elements, left on all ranks.

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
    align = lcm(*(c.block for c in (codec, intra) if c is not None), policy.DENSE_ALIGN)
    shards = shard_regions(numel, topology.K, align)
    size = _chunk_size(
        chunk_elems,
        chunk_nbytes,
        numel,
        dtype,
        len(shards),
        align,
        compressed=codec is not None or intra is not None,
        overlap=nodes > 1,
    )
    writer = Writer(topology, bucket)
    divisor = world if op == "mean" else 1
    _check_slot(intra, size, chunk_nbytes)
    one_shot = intra is None and chunk_elems is None and _one_shot(topology, numel, dtype, chunk_nbytes)
    if one_shot:
        shards, size = [Region(0, numel)], max(size, numel)
    route = Route(divisor=divisor, one_shot=one_shot, intra=intra is not None, exchange=way)
    route.write(writer, topology, shards, size=size, align=align)
    return Plan(
        collective="allreduce",
        numel=numel,
        dtype=dtype,
        op=op,
        compressor="none" if codec is None else str(codec),
        topology=topology.without_links(),
        chunk_elems=size,
        steps=tuple(writer.steps),
        intra_compressor="none" if intra is None else str(intra),
    )


def barrier(topology: Topology) -> Plan:
    """An all-reduce of one int64."""
    return replace(allreduce(topology, 1, dtype="int64"), collective="barrier")


def broadcast(
    topology: Topology,
    numel: int,
    *,
    root: int,
    dtype: str = "float32",
    chunk_elems: int | None = None,
    chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
) -> Plan:
    """Copies ``root``'s ``numel`` elements to all ranks: to one leader per node, then inside the nodes."""
    policy.itemsize(dtype)
    align = policy.DENSE_ALIGN
    size = _chunk_size(chunk_elems, chunk_nbytes, numel, dtype, 1, align)
    leaders, home = topology.leaders(root), topology.node_of(root)
    chunks = [chunks_of(0, Region(0, numel), size, leaders)]
    writer = _copy_out(topology, chunks, [home])
    return _copy_plan("broadcast", writer, topology=topology, numel=numel, dtype=dtype, size=size, root=root)


def all_gather(
    topology: Topology,
    numel: int,
    *,
    dtype: str = "float32",
    chunk_elems: int | None = None,
    chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
) -> Plan:
    """Part r of W equal parts goes from rank r to all ranks; ``numel`` is W * part."""
    parts = _parts(topology, numel, "all_gather")
    size = _chunk_size(chunk_elems, chunk_nbytes, numel, dtype, topology.world_size, policy.DENSE_ALIGN)
    chunks = [chunks_of(rank, part, size, topology.leaders(rank)) for rank, part in enumerate(parts)]
    homes = [topology.node_of(rank) for rank in range(topology.world_size)]
    writer = _copy_out(topology, chunks, homes)
    return _copy_plan("all_gather", writer, topology=topology, numel=numel, dtype=dtype, size=size)


def reduce_scatter(
    topology: Topology,
    numel: int,
    *,
    dtype: str = "float32",
    op: str = "sum",
    chunk_elems: int | None = None,
    chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
) -> Plan:
    """Part r of W equal parts, summed over all ranks, ends on rank r; ``numel`` is W * part.

    The rest of each rank's buffer is scratch: it holds partial sums afterwards.
    """
    _check_request(op, dtype, numel, None)
    nodes, world = len(topology.nodes), topology.world_size
    parts = _parts(topology, numel, "reduce_scatter")
    size = _chunk_size(chunk_elems, chunk_nbytes, numel, dtype, world, policy.DENSE_ALIGN)
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
    return _copy_plan("reduce_scatter", writer, topology=topology, numel=numel, dtype=dtype, size=size, op=op)


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


def _copy_plan(
    collective: str,
    writer: Writer,
    *,
    topology: Topology,
    numel: int,
    dtype: str,
    size: int,
    op: str = "none",
    root: int = -1,
) -> Plan:
    return Plan(
        collective=collective,
        numel=numel,
        dtype=dtype,
        op=op,
        compressor="none",
        topology=topology.without_links(),
        chunk_elems=size,
        steps=tuple(writer.steps),
        root=root,
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


def _check_slot(intra: BlockCodec | None, size: int, slot_nbytes: int) -> None:
    if intra is not None and intra.nbytes(size) > slot_nbytes:
        raise UnsupportedError(
            f"intra_node={intra}: the payload of {size} elements has {intra.nbytes(size)} bytes, a slot of the "
            f"shared memory {slot_nbytes}; raise chunk_nbytes= of init(), or leave the node dense"
        )


def _parts(topology: Topology, numel: int, collective: str) -> list[Region]:
    world = topology.world_size
    if numel % world:
        raise UnsupportedError(
            f"{collective}: numel {numel} is no multiple of the world size {world}; pad it"
        )
    part = numel // world
    return [Region(rank * part, (rank + 1) * part) for rank in range(world)]


def _chunk_size(
    asked: int | None,
    limit: int,
    numel: int,
    dtype: str,
    shards: int,
    align: int,
    *,
    compressed: bool = False,
    overlap: bool = True,
) -> int:
    """``asked`` elements, or what policy says, within ``limit`` bytes (a slot of the shared memory)."""
    if asked is not None:
        if asked <= 0 or asked % align:
            raise UnsupportedError(f"chunk_elems={asked}: must be a positive multiple of {align}")
        return asked
    most = limit // policy.itemsize(dtype) // align * align
    if most == 0:
        raise UnsupportedError(
            f"chunk_nbytes={limit}: a chunk cannot hold one block of {align} {dtype}; raise it"
        )
    wanted = policy.chunk_elems(
        numel=numel, dtype=dtype, shards=shards, align=align, compressed=compressed, overlap=overlap
    )
    return min(wanted, most)


def _check_request(op: str, dtype: str, numel: int, compressor: BlockCodec | None) -> None:
    policy.itemsize(dtype)
    if numel < 0:
        raise UnsupportedError(f"numel={numel}: must be >= 0")
    reduction.check(op, dtype)
    if compressor is not None and op not in ("sum", "mean"):
        raise UnsupportedError(f"compress={compressor} with op={op!r}: only sums and means can be compressed")
    if compressor is not None and dtype != "float32":
        raise UnsupportedError(f"compress={compressor} of {dtype}: only float32 can be compressed")
