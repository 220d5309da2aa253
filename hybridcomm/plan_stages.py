"""Stages that plans are built from: each takes one chunk one step along the route.

Stages are software-pipelined: in slot t, chunk t is in the first stage, chunk t - 1 in the second, and so on,
with the shards side by side. Within a slot the younger chunk goes first, so that a rank hands its data out
before it waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from hybridcomm import policy
from hybridcomm.plan import Region, Step
from hybridcomm.topology import Topology

__all__ = ["Chunk", "Stage", "Writer", "chunks_of", "chunks_of_slices", "pipeline", "shard_regions"]


class Chunk:
    """One chunk on its way through the stages: its region, owners, the ids of the steps written so far."""

    __slots__ = ("decoded", "home", "index", "owners", "ready", "reduced", "region", "shard", "slices")

    def __init__(
        self, shard: int, index: int, region: Region, owners: tuple[int, ...], home: int = -1
    ) -> None:
        self.shard, self.index, self.region, self.owners = shard, index, region, owners
        self.home = home  # the node whose owner adds this chunk's payloads (-1: every owner does)
        self.slices = _slices(region, len(owners), shard + index) if len(owners) > 1 else []
        self.reduced: list[int] = [-1] * len(owners)  # per node: the id of its reduce, -1 where there is none
        self.decoded: tuple[int, ...] = ()  # per node: the id of its decompress, if there is one
        self.ready: tuple[int, ...] = ()  # what the next stage waits for


class Writer:
    """Collects steps and gives out their ids."""

    def __init__(self, topology: Topology, bucket: int) -> None:
        self.nodes, self.bucket = topology.nodes, bucket
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
            self.add("compress", chunk, (owner,), owner, _known(chunk.reduced[node]))
            for node, owner in enumerate(chunk.owners)
        )

    def exchange_payload(self, chunk: Chunk) -> None:
        root = -1 if chunk.home < 0 else chunk.owners[chunk.home]
        chunk.ready = (self.add("exchange_payload", chunk, chunk.owners, root, chunk.ready),)

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


def shard_regions(numel: int, shards: int, align: int) -> list[Region]:
    """Splits ``numel`` elements into at most ``shards`` even, non-empty regions on multiples of ``align``."""
    units = -(-numel // align)
    count = min(shards, units)
    edges = [min(units * i // count * align, numel) for i in range(count + 1)] if count else [0]
    return [Region(begin, end) for begin, end in pairwise(edges)]


def chunks_of(shard: int, region: Region, size: int, owners: tuple[int, ...]) -> list[Chunk]:
    begins = range(region.begin, region.end, size)
    return [Chunk(shard, i, Region(b, min(b + size, region.end)), owners) for i, b in enumerate(begins)]


def chunks_of_slices(
    shard: int, region: Region, size: int, owners: tuple[int, ...], align: int
) -> list[Chunk]:
    """Chunks of a shard that is cut into one slice per node, the slices side by side.

    Neighbouring shards begin at neighbouring nodes, so that shards of fewer blocks than nodes keep all busy.
    """
    nodes, slices = len(owners), shard_regions(region.numel, len(owners), align)
    pieces = [
        (
            place // size,
            (i + shard) % nodes,
            Region(region.begin + b + place, region.begin + min(b + place + size, e)),
        )
        for i, (b, e) in enumerate(slices)
        for place in range(0, e - b, size)
    ]
    pieces.sort(key=lambda piece: piece[0])
    return [Chunk(shard, i, part, owners, home) for i, (_, home, part) in enumerate(pieces)]


def _slices(region: Region, nodes: int, turn: int) -> list[tuple[int, Region]]:
    """Non-empty slices of a chunk with the node whose owner sums each; ``turn`` spreads short chunks."""
    begin, end = region
    parts = shard_regions(end - begin, nodes, policy.DENSE_ALIGN)
    return [((i + turn) % nodes, Region(begin + b, begin + e)) for i, (b, e) in enumerate(parts)]
