"""Stages that plans are built from: each takes one chunk one step along the route.

Stages are software-pipelined: in slot t, chunk t is in the first stage, chunk t - 1 in the second, and so on,
with the shards side by side. Within a slot the younger chunk goes first, so that a rank hands its data out
before it waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from hybridcomm import policy
from hybridcomm.errors import UnsupportedError
from hybridcomm.plan import Region, Step
from hybridcomm.topology import Topology

__all__ = [
    "Chunk",
    "Stage",
    "Writer",
    "chunk_size",
    "chunks_of",
    "equal_parts",
    "pipeline",
    "regions_of",
    "shard_regions",
    "whole_shards",
]


class Chunk:
    """One chunk on its way through the stages: its region, owners, the ids of the steps written so far."""

    __slots__ = ("before", "decoded", "index", "owners", "ready", "reduced", "region", "shard", "slices")

    def __init__(self, shard: int, index: int, region: Region, owners: tuple[int, ...]) -> None:
        self.shard, self.index, self.region, self.owners = shard, index, region, owners
        self.slices = _slices(region, len(owners), shard + index) if len(owners) > 1 else []
        self.reduced: list[int] = [-1] * len(owners)  # per node: the id of its reduce, -1 where there is none
        self.before: list[tuple[int, ...]] = []  # of a whole shard, per node: the ids of its chunks' reduces
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

    def reduce(self, chunk: Chunk, divisor: int = 1) -> None:
        for node, ranks in enumerate(self.nodes):
            if len(ranks) > 1:
                chunk.reduced[node] = self.add("reduce", chunk, ranks, chunk.owners[node], divisor=divisor)
        chunk.ready = tuple(step for step in chunk.reduced if step >= 0)

    def reduce_all(self, chunk: Chunk, divisor: int) -> None:
        """On a single node."""
        chunk.ready = (self.add("reduce_all", chunk, self.nodes[0], -1, divisor=divisor),)

    def compress(self, chunk: Chunk) -> None:
        chunk.ready = tuple(
            self.add(
                "compress",
                chunk,
                (owner,),
                owner,
                chunk.before[node] if chunk.before else _known(chunk.reduced[node]),
            )
            for node, owner in enumerate(chunk.owners)
        )

    def exchange_payload(self, chunk: Chunk) -> None:
        chunk.ready = (self.add("exchange_payload", chunk, chunk.owners, -1, chunk.ready),)

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
            after = tuple(sorted({*own, *_known(chunk.reduced[node])}))
            self.add("gather", chunk, ranks, chunk.owners[node], after)

    def pass_on(self, chunk: Chunk, source: int, target: int) -> None:
        """From one rank to another, once, over the link that the topology has between them."""
        home, away = self.topology.node_of(source), self.topology.node_of(target)
        op = "gather" if home == away else "exchange_gather"
        low, high = sorted((source, target), key=lambda rank: (self.topology.node_of(rank), rank))
        chunk.ready = (self.add(op, chunk, (low, high), source, chunk.ready),)


def _known(step: int) -> tuple[int, ...]:
    return () if step < 0 else (step,)


Stage = Callable[[Chunk], None]


def pipeline(stages: Sequence[Stage], shards: Sequence[Sequence[Chunk]]) -> None:
    longest = max(map(len, shards), default=0)
    for slot in range(longest + len(stages) - 1):
        for age, stage in enumerate(stages):
            for chunks in shards:
                if 0 <= slot - age < len(chunks):
                    stage(chunks[slot - age])


def whole_shards(writer: Writer, shards: Sequence[Sequence[Chunk]], divisor: int) -> None:
    """Steps 4 to 6 once a shard: they wait for all of its chunks, and all of its chunks then wait for them."""
    whole = []
    for chunks in shards:
        first = chunks[0]
        shard = Chunk(first.shard, 0, Region(first.region.begin, chunks[-1].region.end), first.owners)
        shard.before = [
            tuple(s for c in chunks for s in _known(c.reduced[n])) for n in range(len(first.owners))
        ]
        whole.append([shard])
    pipeline(
        [writer.compress, writer.exchange_payload, lambda shard: writer.decompress(shard, divisor)], whole
    )
    for chunks, (shard,) in zip(shards, whole, strict=True):
        for chunk in chunks:
            chunk.decoded = shard.decoded


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
