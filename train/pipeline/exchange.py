"""How the values of a split head travel: started where the list says, waited for where they are used.

HEAD_X   a broadcast of the hidden states over the pipeline
HEAD_C   an all-gather of the statistics over all shards; parts of the hidden states' gradient as messages to the last
         stage's rank, which has the true sums for their scale by then

Parts go unscaled and to the last stage alone, so nobody has to stop between two collectives that need each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hybridcomm.groups import Grouping
from hybridcomm.work import Work

__all__ = ["Combined", "HeadExchange"]

_TAG = 2  # beside the pipeline's F and I


@dataclass(kw_only=True)
class Combined:
    """What HEAD_C has under way for a microbatch: ``every`` rank's statistics, and ``parts`` by their ranks in the
    pipeline, this one's own among them (on the last stage's rank; elsewhere none)."""

    every: Tensor
    work: Work
    parts: list[tuple[int, Tensor]] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)


class HeadExchange:
    """``pipeline``: its ranks in their order, of which ``root`` has the last stage; ``shards``: all that hold items."""

    def __init__(self, pipeline: Grouping, shards: Grouping, root: int) -> None:
        self.pipeline, self.shards, self.root = pipeline, shards, root

    @property
    def at_root(self) -> bool:
        return self.pipeline.rank == self.root

    def broadcast(self, hidden: Tensor) -> Work:
        """From the last stage's rank to the others."""
        work = self.pipeline.broadcast(hidden, self.root, async_op=True)
        assert work is not None  # noqa: S101 (async)
        return work

    def combine(self, statistics: Tensor, part: Tensor, lengths: Sequence[int]) -> Combined:
        """``lengths``: how many rows the part of each rank of the pipeline has."""
        every = statistics.new_empty(self.shards.world_size, *statistics.shape)
        work = self.shards.all_gather(every, statistics, async_op=True)
        assert work is not None  # noqa: S101 (async)
        out = Combined(every=every, work=work)
        if not self.at_root:
            out.works.append(self.pipeline.isend(part, self.root, _TAG))
            return out
        for rank, length in enumerate(lengths):
            room = part if rank == self.root else part.new_empty(length, part.shape[1])
            out.parts.append((rank, room))
            if rank != self.root:
                out.works.append(self.pipeline.irecv(room, rank, _TAG))
        return out
