"""Stages that plans are built from: each takes one chunk one step along the route."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from hybridcomm import policy
from hybridcomm.errors import UnsupportedError
from hybridcomm.plan import Region, Step
from hybridcomm.topology import Topology

__all__ = [
    "Chunk",
    "Writer",
    "chunk_size",
    "chunks_of",
    "equal_parts",
    "regions_of",
    "shard_regions",
]


class Chunk:
    """One chunk on its way through the stages: its region, owners, the ids of the steps written so far."""

    __slots__ = (
        "decoded",
        "encoded",
        "home",
        "index",
        "offered",
        "owners",
        "ready",
        "reduced",
        "region",
        "shard",
        "slices",
    )

    def __init__(
        self, shard: int, index: int, region: Region, owners: tuple[int, ...], home: int = -1
    ) -> None:
        self.shard, self.index, self.region, self.owners = shard, index, region, owners
        self.home = home  # the node whose owner adds this chunk's payloads (-1: every owner does)
        self.slices = _slices(region, len(owners), shard + index) if len(owners) > 1 else []
        self.reduced: list[tuple[int, ...]] = [()] * len(owners)  # per node: the ids of its reduces
        self.offered: list[tuple[int, ...]] = [()] * len(owners)  # per node: the ids of its compress_intra
        self.encoded: tuple[int, ...] = ()  # the ids of its compresses
        self.decoded: tuple[int, ...] = ()  # per node: the id of its decompress, if there is one
        self.ready: tuple[int, ...] = ()  # what the next stage waits for


class Writer:
    """Collects steps and gives out their ids."""

    def __init__(self, topology: Topology, bucket: int) -> None:
        self.topology, self.nodes, self.bucket = topology, topology.nodes, bucket
        self.steps: list[Step] = []

    def add(
        self,
        op: str,
        chunk: Chunk,
        group: tuple[int, ...],
        root: int,
        after: tuple[int, ...] = (),
        *,
        region: Region | None = None,
        divisor: int = 1,
    ) -> int:
        step = Step(
            id=len(self.steps),
            op=op,
            bucket=self.bucket,
            shard=chunk.shard,
            chunk=chunk.index,
            region=chunk.region if region is None else region,
            group=group,
            root=root,
            divisor=divisor,
            after=after,
        )
        self.steps.append(step)
        return step.id

    # -- stages: each takes a chunk one step along the route -----------------------------------------------

    def reduce_on(self, chunk: Chunk, node: int, divisor: int = 1) -> None:
        ranks = self.nodes[node]
        if len(ranks) > 1:
            chunk.reduced[node] = (self.add("reduce", chunk, ranks, chunk.owners[node], divisor=divisor),)
            chunk.ready += chunk.reduced[node]

    def compress_intra_on(self, chunk: Chunk, node: int) -> None:
        for rank in self.nodes[node]:
            if rank != chunk.owners[node]:
                chunk.offered[node] += (self.add("compress_intra", chunk, (rank,), rank),)

    def reduce_payload_on(self, chunk: Chunk, node: int, divisor: int = 1) -> None:
        ranks, root = self.nodes[node], chunk.owners[node]
        if len(ranks) > 1:
            after = chunk.offered[node]
            chunk.reduced[node] = (self.add("reduce_payload", chunk, ranks, root, after, divisor=divisor),)
            chunk.ready += chunk.reduced[node]

    def reduce_all(self, chunk: Chunk, divisor: int) -> None:
        """On a single node."""
        chunk.ready = (self.add("reduce_all", chunk, self.nodes[0], -1, divisor=divisor),)

    def compress_on(self, chunk: Chunk, node: int) -> None:
        owner = chunk.owners[node]
        chunk.encoded += (self.add("compress", chunk, (owner,), owner, chunk.reduced[node]),)

    def exchange_payload(self, chunk: Chunk) -> None:
        root = -1 if chunk.home < 0 else chunk.owners[chunk.home]
        chunk.ready = (self.add("exchange_payload", chunk, chunk.owners, root, chunk.encoded),)

    def recompress(self, chunk: Chunk) -> None:
        """The divisor comes last, so that the second residual is in units of the unscaled sum, as the first."""
        root = chunk.owners[chunk.home]
        chunk.ready += (self.add("recompress", chunk, (root,), root, chunk.ready),)

    def exchange_recompressed(self, chunk: Chunk) -> None:
        root = chunk.owners[chunk.home]
        chunk.ready = (self.add("exchange_recompressed", chunk, chunk.owners, root, chunk.ready),)

    def decompress(self, chunk: Chunk, divisor: int) -> None:
        chunk.decoded = tuple(
            self.add("decompress", chunk, (owner,), owner, chunk.ready, divisor=divisor)
            for owner in chunk.owners
        )

    def exchange_reduce_all(self, chunk: Chunk, divisor: int) -> None:
        chunk.ready = (
            self.add("exchange_reduce_all", chunk, chunk.owners, -1, chunk.ready, divisor=divisor),
        )

    def exchange_reduce(self, chunk: Chunk, divisor: int) -> None:
        after, group = chunk.ready, chunk.owners
        chunk.ready = tuple(
            self.add("exchange_reduce", chunk, group, group[node], after, region=part, divisor=divisor)
            for node, part in chunk.slices
        )

    def exchange_gather(self, chunk: Chunk) -> None:
        chunk.ready = tuple(
            self.add("exchange_gather", chunk, chunk.owners, chunk.owners[node], (before,), region=part)
            for (node, part), before in zip(chunk.slices, chunk.ready, strict=True)
        )

    def gather(self, chunk: Chunk) -> None:
        """Waits for what the root got from other nodes, and for the reduce that read the ranks' regions."""
        for node, ranks in enumerate(self.nodes):
            if len(ranks) == 1:
                continue
            own = chunk.decoded[node : node + 1] or chunk.ready
            after = tuple(sorted({*own, *chunk.reduced[node]}))
            self.add("gather", chunk, ranks, chunk.owners[node], after)

    def pass_on(self, chunk: Chunk, source: int, target: int) -> None:
        """From one rank to another, once, over the link that the topology has between them."""
        home, away = self.topology.node_of(source), self.topology.node_of(target)
        op = "gather" if home == away else "exchange_gather"
        low, high = sorted((source, target), key=lambda rank: (self.topology.node_of(rank), rank))
        chunk.ready = (self.add(op, chunk, (low, high), source, chunk.ready),)


def shard_regions(numel: int, shards: int, align: int) -> list[Region]:
    """Splits ``numel`` elements into at most ``shards`` even, non-empty regions on multiples of ``align``."""
    units = -(-numel // align)
    count = min(shards, units)
    edges = [min(units * i // count * align, numel) for i in range(count + 1)] if count else [0]
    return [Region(begin, end) for begin, end in pairwise(edges)]


def chunks_of(
    shard: int, regions: Region | Sequence[Region], size: int, owners: tuple[int, ...] = ()
) -> list[Chunk]:
    """The chunks of a shard, which may consist of several regions: no chunk reaches over an edge."""
    each = [regions] if isinstance(regions, Region) else regions
    cut = [Region(b, min(b + size, r.end)) for r in each for b in range(r.begin, r.end, size)]
    return [Chunk(shard, i, region, owners) for i, region in enumerate(cut)]


def regions_of(sizes: Sequence[int], begin: int = 0) -> list[Region]:
    """Regions of the given sizes, one behind the other; an empty one keeps its place."""
    if any(size < 0 for size in sizes):
        raise UnsupportedError(f"sizes {tuple(sizes)}: must be >= 0")
    return [Region(b, e) for b, e in pairwise(accumulate(sizes, initial=begin))]


def equal_parts(topology: Topology, numel: int, collective: str) -> list[int]:
    """The sizes of one equal part per rank; raises `UnsupportedError` where there are none."""
    world = topology.world_size
    if numel % world:
        raise UnsupportedError(
            f"{collective}: numel {numel} is no multiple of the world size {world}; pad it"
        )
    return [numel // world] * world


def chunk_size(
    asked: int | None,
    limit: int,
    *,
    numel: int,
    dtype: str,
    shards: int,
    align: int = policy.DENSE_ALIGN,
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


def _slices(region: Region, nodes: int, turn: int) -> list[tuple[int, Region]]:
    """Non-empty slices of a chunk with the node whose owner sums each; ``turn`` spreads short chunks."""
    begin, end = region
    parts = shard_regions(end - begin, nodes, policy.DENSE_ALIGN)
    return [((i + turn) % nodes, Region(begin + b, begin + e)) for i, (b, e) in enumerate(parts)]
