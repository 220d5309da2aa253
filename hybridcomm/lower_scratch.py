"""Where messages lie in an engine's scratch: rings of buffers, each used again when its last use is over.

A message may arrive while the one before it is still being summed, but not more than ``RING`` of them.
"""

from __future__ import annotations

from typing import TypedDict

__all__ = ["RING", "Message", "PayloadSlot", "Ring", "Slot"]

RING = 16  # messages on the way per purpose; at 256 KiB each, 4 MiB cover 10 Gbit/s at 3 ms
_ALIGN = 64  # bytes: every scratch buffer begins on its own cache line


class Message(TypedDict):
    """Where a message's data lies: bytes into the tensor, or into scratch."""

    offset: int
    nbytes: int
    in_scratch: bool


class Slot:
    """A piece of scratch: the operations that use it now, and those of its last use, which must be over."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.before: list[int] = []
        self.users: list[int] = []


class Ring:
    def __init__(self, begin: int, nbytes: int, slots: int = RING) -> None:
        self.stride = -(-nbytes // _ALIGN) * _ALIGN
        self._slots = [Slot(begin + i * self.stride) for i in range(slots)]
        self._turn = 0

    @property
    def end(self) -> int:
        return self._slots[-1].offset + self.stride

    def take(self) -> Slot:
        slot = self._slots[self._turn % len(self._slots)]
        self._turn += 1
        slot.before, slot.users = slot.users, []
        return slot


class PayloadSlot:
    """The payloads of one chunk, of ``nbytes`` each: in place ``own`` this rank's, in ``second`` that of the sum.

    Where this rank adds the payloads of all nodes, there is one place for each, in node order. ``held`` are the
    scratch offsets of those that it has, in the order in which they are added.
    """

    def __init__(self, slot: Slot, nbytes: int, *, own: int, second: int) -> None:
        self.slot, self.nbytes, self.own, self.second = slot, nbytes, own, second
        self.held: list[int] = []

    def at(self, place: int) -> int:
        return self.slot.offset + place * self.nbytes
