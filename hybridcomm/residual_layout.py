"""Which elements of which tensor a residual holds, and on which op's account: layouts and the keys of a state."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybridcomm.bucket import Span
from hybridcomm.errors import ResidualError
from hybridcomm.plan import RESIDUALS

__all__ = [
    "FIRST",
    "KEY",
    "SECOND",
    "FloatArray",
    "Held",
    "Layout",
    "RegionsByOp",
    "by_op",
    "copy_pieces",
    "describe",
    "follows",
    "joined",
    "misfit",
    "moved",
]

FloatArray = NDArray[np.float32]

FIRST, SECOND = RESIDUALS[:2]

KEY = re.compile(r"(.*)\[(\d+):(\d+)\](?: (\w+))?", re.DOTALL)

Regions = tuple[tuple[int, int], ...]
RegionsByOp = Mapping[str, Sequence[tuple[int, int]]] | Sequence[tuple[int, int]]
"""By op (`Plan.residuals`); a sequence stands for those of "compress"."""


class Held(NamedTuple):
    """Whose residual it is: a parameter's, and which op left it behind."""

    name: str
    op: str

    def key(self, begin: int, end: int) -> str:
        return f"{self.name}[{begin}:{end}]" + (f" {self.op}" if self.op != FIRST else "")


@dataclass(frozen=True)
class Layout:
    """Which elements of which flat tensor an entry holds: by op, regions that ascend, disjoint, not adjacent."""

    numel: int
    spans: tuple[Span, ...]
    regions: tuple[
        tuple[str, Regions], ...
    ]  # ops in the order of the buffer; those without regions are left out

    def size(self, upto: str = "") -> int:
        """Elements of the buffer, or of what comes before those of an op."""
        ops = [op for op, _ in self.regions]
        parts = self.regions[: ops.index(upto)] if upto in ops else self.regions
        return sum(end - begin for _, regions in parts for begin, end in regions)

    def pieces(self) -> Iterator[tuple[Held, int, int, int]]:
        """(whose, begin and end within the parameter, offset in the flat buffer) of all held elements."""
        offset = 0
        for op, begin, end in ((op, *region) for op, regions in self.regions for region in regions):
            for span in self.spans:
                low, high = max(begin, span.begin), min(end, span.end)
                if low < high:
                    yield Held(span.name, op), low - span.begin, high - span.begin, offset + low - begin
            offset += end - begin

    def held(self) -> set[Held]:
        """All whose residuals may be here."""
        return {Held(span.name, op) for span in self.spans for op, _ in self.regions}


def follows(before: Layout, after: Layout) -> bool:
    """Whether ``after`` is ``before`` with other ops, none of which lose anything."""
    old, new = dict(before.regions), dict(after.regions)
    same = replace(before, regions=()) == replace(after, regions=())
    return (
        same
        and all(new.get(op, regions) == regions for op, regions in old.items())
        and old.keys() - new <= {SECOND}
    )


def moved(values: FloatArray, before: Layout, after: Layout) -> FloatArray:
    """``values`` in another layout: a second residual that has no place joins the first."""
    out, places = np.zeros(after.size(), np.float32), dict(after.regions)
    for op, regions in before.regions:
        rest = values[before.size(op) :]
        for begin, end in regions:
            into = after.size(op if op in places else FIRST)
            for low, high in places.get(op) or places.get(FIRST, ()):
                if low <= begin and end <= high:
                    out[into + begin - low :][: end - begin] += rest[: end - begin]
                into += high - low
            rest = rest[end - begin :]
    return out


def by_op(regions: RegionsByOp) -> Mapping[str, Sequence[tuple[int, int]]]:
    return regions if isinstance(regions, Mapping) else {FIRST: regions}


def joined(regions: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Adjacent regions joined, so that another chunk size is still the same layout."""
    out: list[tuple[int, int]] = []
    for begin, end in regions:
        if out and out[-1][1] > begin:
            raise ResidualError(f"regions must ascend and not overlap: {out[-1]} before {(begin, end)}")
        if out and out[-1][1] == begin:
            out[-1] = (out[-1][0], end)
        elif end > begin:
            out.append((begin, end))
    return tuple(out)


def copy_pieces(pieces: Iterable[tuple[int, FloatArray]], begin: int, end: int, out: FloatArray) -> int:
    got = 0
    for start, values in pieces:
        low, high = max(start, begin), min(start + len(values), end)
        if low < high:
            out[low - begin : high - begin] = values[low - start : high - start]
            got += high - low
    return got


def misfit(entry: str, held: Held, what: str) -> ResidualError:
    return ResidualError(
        f"residual state ({held.op}) of parameter {held.name!r} (bucket {entry!r}) {what}; it was saved by another "
        "rank or under another topology: load it where it was saved, or start a new Residual and lose it"
    )


def describe(layout: Layout) -> str:
    held = ", ".join(f"{op} {sum(e - b for b, e in regions)}" for op, regions in layout.regions)
    return f"({held or 'nothing'}) of {layout.numel} elements in {len(layout.spans)} spans"
