"""A simulated GPU whose activations the host computes: calls of them go through device memory.

On a GPU torch would compute in the order of its stream. Here the host does, on CPU tensors: what it gives to a call is
copied to device memory, and what comes back is copied to it where it waits. Device memory is let go at once, so that an
engine that does not keep it is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hybridcomm.device_context import DeviceContext

__all__ = ["HostComputed"]


class _Arriving:
    """A work, behind which results are copied to the host's tensors: once, by whoever waits first."""

    def __init__(self, work: Any, arrive: Callable[[], None]) -> None:
        self._work, self._arrive = work, arrive

    def wait(self) -> None:
        self._work.wait()
        self._arrive()
        self._arrive = lambda: None

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())


class HostComputed(DeviceContext):
    """``provider`` is a `tests.gpu.simulated_torch.SimulatedTorch`."""

    def _computed(self, t: Any) -> bool:
        """Whether it would be the device's, did a GPU compute it."""
        return isinstance(t, torch.Tensor) and t.dtype is torch.float32 and not self.provider.owns(t)

    def _room(self, t: torch.Tensor) -> torch.Tensor:
        """Device memory as large."""
        nbytes = t.numel() * t.element_size()
        room: torch.Tensor = self.provider.empty(max(nbytes, 1))[:nbytes].view(t.dtype).view(t.shape)
        return room

    def _put(self, t: torch.Tensor) -> torch.Tensor:
        room = self._room(t)
        room.copy_(t.detach())
        self.provider.writes(room, "computed")
        return room

    def _later(self, work: Any, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> _Arriving:
        """``pairs``: what the host has, and the device memory that it comes from."""
        pairs = list(pairs)

        def arrive() -> None:
            self.provider.synchronize()
            for target, source in pairs:
                self.provider.reads(source, "arrived")
                target.detach().copy_(source)
            pairs.clear()

        return _Arriving(work, arrive)

    def _now_or_later(
        self, work: Any, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], async_op: bool
    ) -> Any:
        later = self._later(work, pairs)
        if async_op:
            return later
        return later.wait()

    def allreduce(self, t: Any, *, async_op: bool = False, **options: Any) -> Any:
        if not self._computed(t):
            return super().allreduce(t, async_op=async_op, **options)
        room = self._put(t)
        work = super().allreduce(room, async_op=True, **options)
        return self._now_or_later(work, [(t, room)], async_op)

    def all_gather(self, out: Any, t: Any, *, async_op: bool = False, **options: Any) -> Any:
        if not self._computed(t):
            return super().all_gather(out, t, async_op=async_op, **options)
        parts = out if isinstance(out, (list, tuple)) else [out]
        rooms = [self._room(part) for part in parts]
        into = rooms if parts is out else rooms[0]
        work = super().all_gather(into, self._put(t), async_op=True, **options)
        return self._now_or_later(work, [*zip(parts, rooms, strict=True)], async_op)

    def reduce_scatter(self, out: Any, input_list: Any, *, async_op: bool = False, **options: Any) -> Any:
        if not self._computed(out):
            return super().reduce_scatter(out, input_list, async_op=async_op, **options)
        room = self._room(out)
        work = super().reduce_scatter(room, [self._put(t) for t in input_list], async_op=True, **options)
        return self._now_or_later(work, [(out, room)], async_op)

    def batch(self, messages: Sequence[tuple[bool, Any, int]], **options: Any) -> Any:
        if not any(self._computed(t) for _, t, _ in messages):
            return super().batch(messages, **options)
        rooms = [self._put(t) if sends else self._room(t) for sends, t, _ in messages]
        work = super().batch(
            [(sends, room, peer) for (sends, _, peer), room in zip(messages, rooms, strict=True)], **options
        )
        arriving = [(t, room) for (sends, t, _), room in zip(messages, rooms, strict=True) if not sends]
        return self._later(work, arriving)
