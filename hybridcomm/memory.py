"""Where the elements of one call lie: a plan's flat buffer, put together from a caller's arrays.

The engine takes addresses of regions (pieces), so several tensors make one buffer without a copy. What a caller's
array must not be used for goes through scratch: partial sums in an input, and small tensors packed into one message.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from hybridcomm.arrays import Array, View
from hybridcomm.policy import itemsize

__all__ = ["Memory", "ScratchPool"]

_ALIGN = 64  # bytes
_KEPT = 2  # arrays that a pool holds on to


class ScratchPool:
    """Scratch that calls take and give back; mapping fresh pages for each call would halve a large one's speed."""

    def __init__(self) -> None:
        self._free: list[np.ndarray[Any, Any]] = []

    def take(self, nbytes: int) -> np.ndarray[Any, Any]:
        try:
            found = self._free.pop()
        except IndexError:
            found = np.empty(0, np.uint8)
        return found if found.nbytes >= nbytes else np.empty(nbytes, np.uint8)

    def give(self, arrays: Iterable[np.ndarray[Any, Any]]) -> None:
        self._free = sorted([*self._free, *arrays], key=len)[-_KEPT:]


class _Span(NamedTuple):
    begin: int
    end: int
    address: int
    writable: bool


@dataclass(kw_only=True, slots=True)
class Memory:
    """The memory of one call on elements of ``dtype``.

    ``written``: arrays that results go to. ``kept``: what must stay alive until `finish`.
    """

    dtype: str
    pool: ScratchPool
    written: list[Array] = field(default_factory=list)
    kept: list[Array] = field(default_factory=list)
    _spans: list[_Span] = field(default_factory=list)
    _copies: list[tuple[int, int, int]] = field(default_factory=list)
    _scratch: list[np.ndarray[Any, Any]] = field(default_factory=list)

    def place(self, begin: int, numel: int, address: int, *, writable: bool = True) -> None:
        """Elements from ``begin`` on lie at ``address``; spans never overlap."""
        if numel:
            self._spans.append(_Span(begin, begin + numel, address, writable))

    def write_to(self, *targets: View) -> None:
        self.written += [target.owner for target in targets]

    def keep(self, *inputs: View) -> None:
        self.kept += [each.owner for each in inputs]

    def scratch(self, numel: int) -> int:
        """The address of room for so many elements."""
        array = self.pool.take(numel * itemsize(self.dtype))
        self._scratch.append(array)
        return int(array.ctypes.data)

    def copy(self, target: int, source: int, numel: int) -> None:
        """At once, between two addresses."""
        if numel and target != source:
            ctypes.memmove(target, source, numel * itemsize(self.dtype))

    def copy_later(self, target: int, source: int, numel: int) -> None:
        """When the call is done."""
        if numel:
            self._copies.append((target, source, numel))

    def pack(self, begin: int, tensors: Sequence[View]) -> None:
        """Elements from ``begin`` on are those of ``tensors``, copied into one piece now and back when it is done."""
        numel = sum(each.numel for each in tensors)
        address = self.scratch(numel)
        self.place(begin, numel, address)
        for each in tensors:
            self.copy(address, each.address, each.numel)
            self.copy_later(each.address, address, each.numel)
            address += each.nbytes

    def shield(self, regions: Sequence[tuple[int, int]]) -> None:
        """Moves what steps will write in arrays that are only to be read into scratch, contents and all."""
        size, spans, moved = itemsize(self.dtype), [], []
        for span in self._spans:
            cuts = [] if span.writable else [r for r in regions if r[0] < span.end and span.begin < r[1]]
            at = span.begin
            for begin, end in cuts:
                inner = span._replace(begin=max(begin, at), end=min(end, span.end))
                inner = inner._replace(address=span.address + (inner.begin - span.begin) * size)
                if at < inner.begin:
                    spans.append(_Span(at, inner.begin, span.address + (at - span.begin) * size, False))
                moved.append(inner)
                at = inner.end
            if at < span.end:
                spans.append(_Span(at, span.end, span.address + (at - span.begin) * size, span.writable))
        if moved:
            address = self.scratch(sum(s.end - s.begin + _ALIGN // size for s in moved))
            for span in moved:
                self.copy(address, span.address, span.end - span.begin)
                spans.append(span._replace(address=address, writable=True))
                address += -(-(span.end - span.begin) * size // _ALIGN) * _ALIGN
            self._spans = spans

    def table(self) -> tuple[int, list[tuple[int, int]]]:
        """(address of all elements, no pieces), or (0, pieces) where they lie in several places."""
        size, merged = itemsize(self.dtype), list[_Span]()
        for span in sorted(self._spans):
            last = merged[-1] if merged else None
            if (
                last
                and last.end == span.begin
                and last.address + (last.end - last.begin) * size == span.address
            ):
                merged[-1] = last._replace(end=span.end)
            else:
                merged.append(span)
        if len(merged) == 1 and merged[0].begin == 0:
            return merged[0].address, []
        return 0, [(span.begin, span.address) for span in merged]

    def finish(self) -> None:
        """After the call: the copies that are left, and scratch goes back."""
        for target, source, numel in self._copies:
            self.copy(target, source, numel)
        self.pool.give(self._scratch)
        self._copies, self._scratch = [], []
