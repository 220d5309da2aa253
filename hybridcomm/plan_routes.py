"""The route of an all-reduce: which stages its chunks go through, from step 3 to step 7.

    small        reduce_all, on a single node
    dense        reduce -> exchange_reduce (one slice per node) -> exchange_gather -> gather
    at once      reduce -> exchange_reduce_all -> gather
    compressed   reduce -> compress -> exchange_payload -> decompress -> gather
    two stages   reduce -> compress -> exchange_payload (to the slice's owner) -> recompress
                 -> exchange_recompressed -> decompress -> gather
    in the node  compress_intra -> reduce_payload, instead of reduce

A stage with no peer vanishes. A codec that selects over a whole region gets each shard, in two stages each slice, in
one piece: its stages wait for all chunks, and all chunks then wait for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from hybridcomm.plan import Region
from hybridcomm.plan_pipeline import (
    Round,
    RoundStage,
    for_each,
    for_each_node,
    pipeline,
    rounds_of,
    take_over,
    whole_regions,
)
from hybridcomm.plan_stages import Writer, chunks_of

__all__ = ["Route"]


@dataclass(frozen=True, kw_only=True)
class Route:
    """``divisor`` of the whole; ``one_shot``: all ranks of the only node sum everything; ``intra``: compressed
    inside nodes; ``whole``: whether the codecs between nodes and inside them take whole regions.

    ``exchange``: of payloads "gather" or "two_stage", dense "none" (in slices) or "at_once".
    """

    divisor: int
    one_shot: bool
    intra: bool
    exchange: str
    whole: tuple[bool, bool]

    def write(self, writer: Writer, shards: Sequence[Sequence[Region]], *, size: int, align: int) -> None:
        """Writes down the steps of all ``shards``, in chunks of up to ``size`` elements."""
        rounds = [self._rounds(writer, shard, regions, size, align) for shard, regions in enumerate(shards)]
        wholes, was_whole = whole_regions(rounds), False
        phases = [
            (self.whole[1], self._reduce(writer)),
            (self.whole[0], self._exchange(writer)),
            (False, self._gather(writer)),
        ]
        for whole, group in groupby((phase for phase in phases if phase[1]), key=lambda phase: phase[0]):
            if whole != was_whole:
                take_over(wholes, rounds, whole=whole)
                was_whole = whole
            stages = [stage for _, part in group for stage in part]
            pipeline(stages, wholes if whole else rounds)

    def _rounds(
        self, writer: Writer, shard: int, regions: Sequence[Region], size: int, align: int
    ) -> list[Round]:
        owners = writer.topology.owners(shard)
        if self.exchange == "two_stage":
            return rounds_of(shard, regions, size, owners, align)
        return [(chunk,) for chunk in chunks_of(shard, regions, size, owners)]

    def _reduce(self, writer: Writer) -> list[RoundStage]:
        last = self.divisor if len(writer.nodes) == 1 else 1
        if self.one_shot:
            return [for_each(lambda chunk: writer.reduce_all(chunk, self.divisor))]
        if writer.topology.K == 1:
            return []
        if self.intra:
            add = for_each_node(lambda chunk, node: writer.reduce_payload_on(chunk, node, last))
            return [for_each_node(writer.compress_intra_on), add]
        return [for_each_node(lambda chunk, node: writer.reduce_on(chunk, node, last))]

    def _exchange(self, writer: Writer) -> list[RoundStage]:
        if len(writer.nodes) == 1:
            return []
        if self.exchange == "at_once":
            return [for_each(lambda chunk: writer.exchange_reduce_all(chunk, self.divisor))]
        if self.exchange == "none":
            dense = for_each(lambda chunk: writer.exchange_reduce(chunk, self.divisor))
            return [dense, for_each(writer.exchange_gather)]
        again = (writer.recompress, writer.exchange_recompressed) if self.exchange == "two_stage" else ()
        return [
            for_each_node(writer.compress_on),
            *map(for_each, (writer.exchange_payload, *again)),
            for_each(lambda chunk: writer.decompress(chunk, self.divisor)),
        ]

    def _gather(self, writer: Writer) -> list[RoundStage]:
        return [for_each(writer.gather)] if writer.topology.K > 1 and not self.one_shot else []
