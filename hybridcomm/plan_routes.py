"""The route of an all-reduce: which stages its chunks go through, from step 3 to step 7.

    small        reduce_all, on a single node
    dense        reduce -> exchange_reduce (one slice per node) -> exchange_gather -> gather
    compressed   reduce -> compress -> exchange_payload -> decompress -> gather
    two stages   reduce -> compress -> exchange_payload (to the slice's owner) -> recompress
                 -> exchange_recompressed -> decompress -> gather
    in the node  compress_intra -> reduce_payload, instead of reduce

A stage with no peer vanishes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridcomm.plan import Region
from hybridcomm.plan_stages import (
    NodeStage,
    RoundStage,
    Stage,
    Writer,
    chunks_of,
    for_each,
    for_each_node,
    on_all_nodes,
    pipeline,
    rounds_of,
)
from hybridcomm.topology import Topology

__all__ = ["Route"]


@dataclass(frozen=True, kw_only=True)
class Route:
    """``divisor`` of the whole; ``one_shot``: all ranks of the only node sum everything; ``intra``: compressed
    inside nodes; ``exchange``: of payloads, "none": dense.
    """

    divisor: int
    one_shot: bool
    intra: bool
    exchange: str

    def write(
        self, writer: Writer, topology: Topology, shards: Sequence[Sequence[Region]], *, size: int, align: int
    ) -> None:
        """Writes down the steps of all ``shards``, in chunks of up to ``size`` elements."""
        if self.exchange == "two_stage":
            rounds = [rounds_of(s, r, size, topology.owners(s), align) for s, r in enumerate(shards)]
            pipeline(self._two_stages(writer), rounds)
        else:
            chunks = [chunks_of(s, r, size, topology.owners(s)) for s, r in enumerate(shards)]
            pipeline(self._stages(writer), chunks)

    def _reduce(self, writer: Writer) -> list[NodeStage]:
        last = self.divisor if len(writer.nodes) == 1 else 1
        if max(map(len, writer.nodes)) == 1:
            return []
        if self.intra:
            return [
                writer.compress_intra_on,
                lambda chunk, node: writer.reduce_payload_on(chunk, node, last),
            ]
        return [lambda chunk, node: writer.reduce_on(chunk, node, last)]

    def _stages(self, writer: Writer) -> list[Stage]:
        if self.one_shot:
            return [lambda chunk: writer.reduce_all(chunk, self.divisor)]
        stages = [on_all_nodes(stage) for stage in self._reduce(writer)]
        gather = [writer.gather] if stages else []
        if self.exchange == "gather":
            stages += [on_all_nodes(writer.compress_on), writer.exchange_payload]
            stages.append(lambda chunk: writer.decompress(chunk, self.divisor))
        elif len(writer.nodes) > 1:
            stages += [lambda chunk: writer.exchange_reduce(chunk, self.divisor), writer.exchange_gather]
        return stages + gather

    def _two_stages(self, writer: Writer) -> list[RoundStage]:
        stages = [for_each_node(stage) for stage in self._reduce(writer)]
        gather = [for_each(writer.gather)] if stages else []
        stages.append(for_each_node(writer.compress_on))
        stages += map(for_each, (writer.exchange_payload, writer.recompress, writer.exchange_recompressed))
        stages.append(for_each(lambda chunk: writer.decompress(chunk, self.divisor)))
        return stages + gather
