"""The order in which stages take chunks: a pipeline, by chunk, or by round of chunks that go through it together.

Stages are software-pipelined: in slot t, chunk t is in the first stage, chunk t - 1 in the second, and so on,
with the shards side by side. Within a slot the younger chunk goes first, so that a rank hands its data out
before it waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from hybridcomm.plan import Region
from hybridcomm.plan_stages import Chunk, shard_regions

__all__ = [
    "NodeStage",
    "Round",
    "RoundStage",
    "Stage",
    "for_each",
    "for_each_node",
    "on_all_nodes",
    "pipeline",
    "rounds_of",
    "take_over",
    "whole_regions",
]

Stage = Callable[[Chunk], None]
NodeStage = Callable[[Chunk, int], None]
Round = tuple[Chunk, ...]
RoundStage = Callable[[Round], None]
Item = TypeVar("Item")


def pipeline(stages: Sequence[Callable[[Item], None]], shards: Sequence[Sequence[Item]]) -> None:
    """Items are chunks, or what else ``stages`` take."""
    longest = max(map(len, shards), default=0)
    for slot in range(longest + len(stages) - 1):
        for age, stage in enumerate(stages):
            for items in shards:
                if 0 <= slot - age < len(items):
                    stage(items[slot - age])


def on_all_nodes(stage: NodeStage) -> Stage:
    """``stage`` for a chunk on one node after the other."""

    def run(chunk: Chunk) -> None:
        for node in range(len(chunk.owners)):
            stage(chunk, node)

    return run


def for_each(stage: Stage) -> RoundStage:
    """``stage`` for all chunks of a round."""

    def run(chunks: Round) -> None:
        for chunk in chunks:
            stage(chunk)

    return run


def for_each_node(stage: NodeStage) -> RoundStage:
    """``stage`` for all chunks of a round on all nodes, each of which begins with the slice of the node behind it.

    So their payloads go to as many owners at a time, instead of all to the first, then all to the second.
    """

    def run(chunks: Round) -> None:
        nodes = len(chunks[0].owners)
        at = sorted(chunks, key=lambda chunk: chunk.home)
        first = [sum(chunk.home <= node for chunk in at) for node in range(nodes)]
        for turn in range(len(at)):
            for node in range(nodes):
                stage(at[(first[node] + turn) % len(at)], node)

    return run


def whole_regions(rounds: Sequence[Sequence[Round]]) -> list[list[Round]]:
    """Of each shard, the one round in which its slices, or all of it where it has none, are a chunk each."""
    found = []
    for of_shard in rounds:
        parts = _parts(of_shard)
        wholes = [
            Chunk(
                each[0].shard, index, Region(each[0].region.begin, each[-1].region.end), each[0].owners, home
            )
            for index, (home, each) in enumerate(parts.items())
        ]
        found.append([tuple(wholes)])
    return found


def take_over(wholes: Sequence[Sequence[Round]], rounds: Sequence[Sequence[Round]], *, whole: bool) -> None:
    """Hands on what to wait for: from all chunks to their whole region (``whole``), or back, where they have none."""
    for (of_wholes,), of_shard in zip(wholes, rounds, strict=True):
        for region, chunks in zip(of_wholes, _parts(of_shard).values(), strict=True):
            if whole:
                region.ready = tuple(step for chunk in chunks for step in chunk.ready)
                region.reduced = [sum(each, ()) for each in zip(*(c.reduced for c in chunks), strict=True)]
            else:
                for chunk in chunks:
                    chunk.ready, chunk.decoded = region.ready, region.decoded
                    chunk.reduced = [
                        own or of_all for own, of_all in zip(chunk.reduced, region.reduced, strict=True)
                    ]


def _parts(rounds: Sequence[Round]) -> dict[int, list[Chunk]]:
    """Home -> its chunks, in order."""
    parts: dict[int, list[Chunk]] = {}
    for chunk in (chunk for chunks in rounds for chunk in chunks):
        parts.setdefault(chunk.home, []).append(chunk)
    return parts


def rounds_of(
    shard: int, regions: Sequence[Region], size: int, owners: tuple[int, ...], align: int
) -> list[Round]:
    """Chunks of a shard whose regions are cut into one slice per node: a round holds one chunk of each slice.

    A round goes from stage to stage as one: were one slice's second payload to come before another's first on the
    link of two nodes, it would hold that up. Neighbouring shards begin at neighbouring nodes, so that shards of
    fewer blocks than nodes keep all busy.
    """
    nodes, found, index = len(owners), [], 0
    for region in regions:
        slices = shard_regions(region.numel, nodes, align)
        for begin in range(0, max(part.numel for part in slices), size):
            cut = []
            for i, part in enumerate(slices):
                first = region.begin + part.begin + begin
                piece = Region(first, min(first + size, region.begin + part.end))
                if piece.numel > 0:
                    cut.append(Chunk(shard, index, piece, owners, (i + shard) % nodes))
                    index += 1
            found.append(tuple(cut))
    return found
