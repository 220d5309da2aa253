"""Step 2 of 7: bucket.

In: parameters, in the order in which they were registered. Out: flat, padded buffers whose spans are keyed by
parameter name, ordered as backward fills them (last parameter first).
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from hybridcomm import policy
from hybridcomm.errors import HybridCommError, UnsupportedError

__all__ = ["Bucket", "BucketLayout", "BucketState", "ParameterSize", "Span", "plan_buckets"]


class Span(NamedTuple):
    """Elements ``[begin, end)`` of a flat buffer are parameter ``name``, flattened in C order."""

    name: str
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.begin


class ParameterSize(NamedTuple):
    """What bucketing needs to know of a parameter: its name, elements, and its bucket's dtype.

    ``compress``: the text of what compresses it. ``align``: its bucket is padded to a multiple of so many elements.
    """

    name: str
    numel: int
    dtype: str
    compress: str = "none"
    align: int = policy.DENSE_ALIGN


@dataclass(frozen=True, kw_only=True)
class BucketLayout:
    """Where each parameter lies in one flat buffer of ``numel`` elements (padding at the end included)."""

    index: int
    dtype: str
    spans: tuple[Span, ...]
    numel: int
    compress: str = "none"

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(span.name for span in self.spans)

    @property
    def nbytes(self) -> int:
        return self.numel * policy.itemsize(self.dtype)

    @property
    def used(self) -> int:
        """Elements that belong to parameters; the rest is padding and stays zero."""
        return self.spans[-1].end if self.spans else 0

    @cached_property
    def key(self) -> str:
        """Names the bucket by its first and last parameter, never by its index: buckets get rebuilt."""
        return f"{self.spans[0].name}..{self.spans[-1].name}" if self.spans else "empty"

    def digest(self) -> int:
        """63-bit digest (fits int64) of everything that must agree between ranks."""
        text = f"{self.index} {self.dtype} {self.numel} {self.compress} {list(map(tuple, self.spans))}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def plan_buckets(parameters: Iterable[ParameterSize], *, cap_nbytes: int) -> tuple[BucketLayout, ...]:
    """Lays parameters, given in registration order, into buckets in backward (reverse) order.

    A bucket closes when the next parameter would take it past ``cap_nbytes``; a larger parameter gets a
    bucket of its own. Parameters of another dtype, or compressed otherwise, open a bucket beside it. Buckets are
    numbered by when they fill up: by their last parameter. Each is padded once, as its parameters ask.
    """
    if cap_nbytes <= 0:
        raise UnsupportedError(f"bucket capacity of {cap_nbytes} bytes: must be > 0")
    open_by_kind: dict[tuple[str, str], list[ParameterSize]] = {}
    closed: list[tuple[int, list[ParameterSize]]] = []
    position: dict[str, int] = {}
    for place, parameter in enumerate(reversed(list(parameters))):
        if parameter.name in position:
            raise UnsupportedError(f"parameter {parameter.name!r} is listed twice")
        position[parameter.name] = place
        kind = parameter.dtype, parameter.compress
        members = open_by_kind.setdefault(kind, [])
        held = sum(member.numel for member in members) + parameter.numel
        if members and held * policy.itemsize(parameter.dtype) > cap_nbytes:
            closed.append((position[members[-1].name], members))
            members = open_by_kind[kind] = []
        members.append(parameter)
    closed += [(position[members[-1].name], members) for members in open_by_kind.values()]
    ordered = (members for _, members in sorted(closed, key=lambda item: item[0]))
    return tuple(_layout(index, members) for index, members in enumerate(ordered))


def _layout(index: int, members: Sequence[ParameterSize]) -> BucketLayout:
    spans: list[Span] = []
    begin = 0
    for member in members:
        spans.append(Span(member.name, begin, begin + member.numel))
        begin += member.numel
    align = math.lcm(*(member.align for member in members))
    return BucketLayout(
        index=index,
        dtype=members[0].dtype,
        spans=tuple(spans),
        numel=-(-begin // align) * align,
        compress=members[0].compress,
    )


class BucketState(enum.Enum):
    """FILLING -> READY -> IN_FLIGHT -> DONE, and back to FILLING when the next step begins."""

    FILLING = "filling"
    READY = "ready"
    IN_FLIGHT = "in_flight"
    DONE = "done"


_NEXT = {
    BucketState.FILLING: BucketState.READY,
    BucketState.READY: BucketState.IN_FLIGHT,
    BucketState.IN_FLIGHT: BucketState.DONE,
    BucketState.DONE: BucketState.FILLING,
}


class Bucket:
    """Ready bookkeeping of one layout; the flat buffer itself belongs to the reducer."""

    def __init__(self, layout: BucketLayout) -> None:
        self.layout = layout
        self.state = BucketState.FILLING
        self._missing = dict.fromkeys(layout.names)

    @property
    def missing(self) -> tuple[str, ...]:
        """Parameters whose gradient is not in the buffer yet."""
        return tuple(self._missing)

    def mark_ready(self, name: str) -> None:
        """One parameter's gradient lies in the buffer; the last one makes the bucket READY."""
        if self.state is not BucketState.FILLING or name not in self._missing:
            raise HybridCommError(
                f"bucket {self.layout.index}: parameter {name!r} got a second gradient while the bucket is "
                f"{self.state.value}; call finalize() after each backward, and accumulate under no_sync()"
            )
        del self._missing[name]
        if not self._missing:
            self.advance(BucketState.READY)

    def advance(self, to: BucketState) -> None:
        """Moves one state on; raises for any other move."""
        if _NEXT[self.state] is not to:
            raise HybridCommError(
                f"bucket {self.layout.index}: cannot go from {self.state.value} to {to.value}"
            )
        self.state = to

    def reset(self) -> None:
        """Back to FILLING with nothing in it, from any state (a step that failed, or a new one)."""
        self.state = BucketState.FILLING
        self._missing = dict.fromkeys(self.layout.names)
