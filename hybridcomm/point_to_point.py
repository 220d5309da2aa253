"""Point-to-point messages: send, recv, isend, irecv, and batches of them.

They wait for no collective and no collective waits for them. A message is matched by (sender, receiver, group, tag),
those of one such kind in the order of their calls; messages of other tags may overtake it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridcomm.arrays import Array, view
from hybridcomm.collectives_base import note_written
from hybridcomm.errors import GroupError, UnsupportedError
from hybridcomm.lower import DTYPES
from hybridcomm.work import Work

if TYPE_CHECKING:
    from collections import deque

    from hybridcomm import _C
    from hybridcomm.device_context import DeviceContext
    from hybridcomm.device_work import DeviceWork
    from hybridcomm.members import Members

__all__ = ["P2POp", "PointToPoint", "batch_isend_irecv"]

_SWEEP = 32
_Half = tuple[bool, int, int, int, int, int, int]  # as the engine takes it: csrc/bind_engine.cpp


class PointToPoint:
    """Messages between two ranks of a context or group."""

    rank: int
    members: Members | None
    _engine: _C.Engine
    _prepared: _C.PreparedCalls
    _running: deque[Work]

    @property
    def world_size(self) -> int:
        raise NotImplementedError

    def send(self, t: Array, dst: int, tag: int = 0) -> None:
        """Sends ``t`` to rank ``dst``; returns when ``t`` may be changed.

        That is at once for short messages, or when the receiver has taken it.
        """
        self._engine.exchange([self._half(True, t, dst, tag)])

    def recv(self, t: Array, src: int | None, tag: int = 0) -> int:
        """Receives into ``t``, of the shape and dtype that were sent, from rank ``src``; returns ``src``."""
        half = self._half(False, t, src, tag)
        self._engine.exchange([half])
        note_written(t)
        return operator.index(src)  # type: ignore[arg-type]

    def isend(self, t: Array, dst: int, tag: int = 0) -> Work:
        """As `send`, but returns at once; ``t`` must stay as it is until the work is done."""
        return self._start_one(True, t, dst, tag)

    def irecv(self, t: Array, src: int | None, tag: int = 0) -> Work:
        """As `recv`, but returns at once; ``t`` holds the message when the work is done."""
        return self._start_one(False, t, src, tag)

    def _start_one(self, sends: bool, t: Array, peer: int | None, tag: int) -> Work:
        job_rank, group = self._meet(peer, tag)
        started = self._prepared.post(sends, t, job_rank, group, tag)
        if started is not None:
            return self._keep(Work(started, [t]))
        half = self._half(sends, t, peer, tag)
        self._prepared.remember_dtype(t, half[4])
        return self._start([half], [t])

    def _start(self, halves: Sequence[_Half], tensors: Sequence[Array]) -> Work:
        for half, t in zip(halves, tensors, strict=True):
            if not half[0]:
                note_written(t)
        return self._keep(Work(self._engine.post(list(halves)), tensors))

    def _keep(self, work: Work) -> Work:
        """Until it is done, whatever its caller does with it."""
        while self._running and self._running[0].is_completed():
            self._running.popleft()
        self._running.append(work)
        if len(self._running) % _SWEEP == 0:  # messages end in any order
            open_works = [other for other in self._running if not other.is_completed()]
            self._running.clear()
            self._running.extend(open_works)
        return work

    def _half(self, sends: bool, t: Array, peer: int | None, tag: int) -> _Half:
        job_rank, group = self._meet(peer, tag)
        found = view(t)
        return sends, job_rank, group, tag, DTYPES.index(found.dtype), found.numel, found.address

    def _meet(self, peer: int | None, tag: int) -> tuple[int, int]:
        """The other's rank in the job, and what names this group to it."""
        if peer is None:
            raise UnsupportedError(
                "recv(src=None): which message comes first would depend on timing, and so would results; "
                "name the sender"
            )
        if not 0 <= tag < 1 << 32:
            raise UnsupportedError(f"tag={tag}: must be an integer from 0 to 2**32 - 1")
        if not 0 <= peer < self.world_size:
            raise GroupError(f"rank {peer} is not in this group of ranks 0..{self.world_size - 1}")
        if peer == self.rank:
            raise UnsupportedError(f"rank {peer} sends to itself: copy the tensor instead")
        return (peer, 0) if self.members is None else (self.members.ranks[peer], self.members.digest)


@dataclass(frozen=True)
class P2POp:
    """One operation of `batch_isend_irecv`: ``op`` is `hybridcomm.isend` or `hybridcomm.irecv`."""

    op: Callable[..., Any]
    tensor: Array
    peer: int
    group: PointToPoint | DeviceContext | None = None
    tag: int = 0

    def __post_init__(self) -> None:
        if getattr(self.op, "__name__", None) not in ("isend", "irecv"):
            raise UnsupportedError(f"P2POp({self.op!r}): op must be hybridcomm.isend or hybridcomm.irecv")


def batch_isend_irecv(ops: Sequence[P2POp]) -> list[Work | DeviceWork]:
    """Starts all of ``ops`` together; one work stands for those of the host, one for those on the GPU."""
    from hybridcomm.default import context_of
    from hybridcomm.placing import gpu_messages

    placed = [(op, context_of(op.group)) for op in ops]
    routes = [gpu_messages(group, op.tensor, op.peer, op.tag) for op, group in placed]
    on_host = [pair for pair, route in zip(placed, routes, strict=True) if route is None]
    on_gpus = [(op, *route) for op, route in zip(ops, routes, strict=True) if route is not None]
    works: list[Work | DeviceWork] = []
    if on_gpus:
        gpus = on_gpus[0][1]
        if any(other is not gpus for _, other, _ in on_gpus):
            raise UnsupportedError("batch_isend_irecv: all operations must be of groups of one context")
        works.append(gpus.batch([(op.op.__name__ == "isend", op.tensor, peer) for op, _, peer in on_gpus]))
    return [*works, *_start_on_host(on_host)]


def _start_on_host(placed: Sequence[tuple[P2POp, PointToPoint]]) -> list[Work]:
    if not placed:
        return []
    ops, groups = zip(*placed, strict=True)
    if any(group._engine is not groups[0]._engine for group in groups):
        raise UnsupportedError("batch_isend_irecv: all operations must be of groups of one context")
    halves = [
        group._half(op.op.__name__ == "isend", op.tensor, op.peer, op.tag)
        for op, group in zip(ops, groups, strict=True)
    ]
    return [groups[0]._start(halves, [op.tensor for op in ops])]
