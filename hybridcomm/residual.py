"""Error feedback: what compression left out, kept until it is sent.

A residual belongs to (node, shard) and is in units of the unscaled node sum. A two-stage exchange has a second
one: what was left out when the sum of a slice was encoded anew. It belongs to the slice and lives with its owner,
in the same units: payloads are added as they are, and the mean is taken last. Compression inside a node has a
third: of a rank and what it does not own, in units of its gradient. The law, over any number of steps:

    sum over steps and ranks of gradients = W * sum of applied mean updates + sum of all residuals

Two buffers per entry, 2 * numel / L fp32 elements per rank (the second stage's: a node's part of that): `commit`
after the optimizer step was applied keeps the new one, `rollback` when it was skipped keeps the old one.
"""

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

__all__ = ["Residual"]

FloatArray = NDArray[np.float32]

_FIRST, _SECOND = RESIDUALS[:2]

_KEY = re.compile(r"(.*)\[(\d+):(\d+)\](?: (\w+))?", re.DOTALL)

Regions = tuple[tuple[int, int], ...]


class _Held(NamedTuple):
    """Whose residual it is: a parameter's, and which op left it behind."""

    name: str
    op: str

    def key(self, begin: int, end: int) -> str:
        return f"{self.name}[{begin}:{end}]" + (f" {self.op}" if self.op != _FIRST else "")


@dataclass(frozen=True)
class _Layout:
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

    def pieces(self) -> Iterator[tuple[_Held, int, int, int]]:
        """(whose, begin and end within the parameter, offset in the flat buffer) of all held elements."""
        offset = 0
        for op, begin, end in ((op, *region) for op, regions in self.regions for region in regions):
            for span in self.spans:
                low, high = max(begin, span.begin), min(end, span.end)
                if low < high:
                    yield _Held(span.name, op), low - span.begin, high - span.begin, offset + low - begin
            offset += end - begin

    def held(self) -> set[_Held]:
        """All whose residuals may be here."""
        return {_Held(span.name, op) for span in self.spans for op, _ in self.regions}


class _Entry:
    def __init__(self, layout: _Layout) -> None:
        size = layout.size()
        self.layout = layout
        self.committed: FloatArray = np.zeros(size, np.float32)
        self.spare: FloatArray = np.zeros(size, np.float32)
        self.staged = False


class Residual:
    """Owns the error-feedback buffers of one or more tensors; what a caller keeps between steps.

    A caller who never commits just carries on: each call compensates with what the last one left. A caller
    who may skip steps calls `commit` or `rollback` once per optimizer step, for all entries at once.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._loaded: dict[_Held, list[tuple[int, FloatArray]]] = {}
        self._strict = False  # a state was loaded: what it does not hold is an error, not a zero

    def stage(
        self,
        name: str,
        *,
        numel: int,
        regions: Mapping[str, Sequence[tuple[int, int]]] | Sequence[tuple[int, int]],
        spans: Sequence[Span] | None = None,
    ) -> tuple[FloatArray, FloatArray]:
        """The buffers for one encode of tensor ``name``: ``(e_in, e_out)``, fp32, 1-D.

        Both are the concatenation of ``regions`` (`Plan.residuals`: by op; without ops: of "compress") of a flat
        tensor of ``numel`` elements. ``spans`` say which parameter each element belongs to (default: all to
        ``name``). The first stage since commit or rollback reads the committed buffer; later ones continue in
        place (e_in is e_out).

        A tensor whose exchange changes to two stages, or whose ranks begin to compress inside the node, begins
        with zeros there; one whose exchange changes back gets the second residual added to the first.

        Raises `ResidualError` when ``name`` was used with another layout, or a loaded state does not fit it.
        """
        by_op = regions if isinstance(regions, Mapping) else {_FIRST: regions}
        joined = ((op, _joined(parts)) for op, parts in by_op.items())
        kept = tuple((op, parts) for op, parts in joined if parts)
        layout = _Layout(numel, tuple(spans or (Span(name, 0, numel),)), kept)
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = self._new_entry(name, layout)
        elif entry.layout != layout:
            if entry.staged or not _follows(entry.layout, layout):
                raise ResidualError(
                    f"residual of {name!r} holds {_describe(entry.layout)}, now asked for {_describe(layout)}; "
                    "keep one Residual per tensor and topology, or start a new one"
                )
            entry = self._entries[name] = _moved(entry, layout)
        before = entry.spare if entry.staged else entry.committed
        entry.staged = True
        return before, entry.spare

    def commit(self) -> None:
        """The optimizer step was applied: what was staged becomes the residual, in all entries."""
        for entry in self._entries.values():
            if entry.staged:
                entry.committed, entry.spare = entry.spare, entry.committed
                entry.staged = False

    def rollback(self) -> None:
        """The optimizer step was skipped or failed: all entries stand as they were at the last commit."""
        for entry in self._entries.values():
            entry.staged = False

    def rekey(self) -> None:
        """Forgets the layout of all entries and keeps their values by parameter span, for other buckets to
        claim.

        What was staged is rolled back. The next `stage` of each parameter must own the same elements.
        """
        if self._entries:
            state = self.state_dict()
            self._entries = {}
            self.load_state_dict(state)

    @property
    def pending(self) -> bool:
        """Whether something is staged that was neither committed nor rolled back."""
        return any(entry.staged for entry in self._entries.values())

    @property
    def nbytes(self) -> int:
        """Memory of all buffers, both halves."""
        return sum(entry.committed.nbytes + entry.spare.nbytes for entry in self._entries.values())

    @property
    def unclaimed(self) -> tuple[str, ...]:
        """Parameters that a loaded state holds and no stage has asked for yet."""
        return tuple(dict.fromkeys(held.name for held in self._loaded))

    def state_dict(self) -> dict[str, FloatArray]:
        """This rank's committed residual: ``"parameter[begin:end]"`` -> fp32 1-D copy.

        Keys end in " recompress" and " compress_intra" where these left it behind.
        Keyed by span of the parameter, so that it outlives another bucket size. What is staged is not saved:
        it belongs to a step that the saved parameters have not seen.
        """
        state = {
            held.key(begin, begin + len(values)): values.copy()
            for held, pieces in self._loaded.items()
            for begin, values in pieces
        }
        for entry in self._entries.values():
            for held, begin, end, offset in entry.layout.pieces():
                state[held.key(begin, end)] = entry.committed[offset : offset + end - begin].copy()
        return state

    def load_state_dict(self, state: Mapping[str, FloatArray]) -> None:
        """Replaces everything with a state of the same rank; buckets may have other names and chunk sizes.

        Raises `ResidualError`, at once or at the next `stage`, where this rank owns other elements than the
        state holds: another topology, or shards that fall elsewhere.
        """
        loaded: dict[_Held, list[tuple[int, FloatArray]]] = {}
        for key, values in state.items():
            match = _KEY.fullmatch(key)
            array = np.asarray(values)
            if match is None or array.dtype != np.float32 or array.ndim != 1:
                raise ResidualError(f"state entry {key!r}: expected 'parameter[begin:end]' -> 1-D float32")
            if int(match[3]) - int(match[2]) != array.size:
                raise ResidualError(f"state entry {key!r} holds {array.size} elements; is the file damaged?")
            loaded.setdefault(_Held(match[1], match[4] or _FIRST), []).append((int(match[2]), array.copy()))
        layouts = {name: entry.layout for name, entry in self._entries.items()}
        old = self._entries, self._loaded, self._strict
        self._entries, self._loaded, self._strict = {}, loaded, True
        try:
            for name, layout in layouts.items():
                self._entries[name] = self._new_entry(name, layout)
        except ResidualError:
            self._entries, self._loaded, self._strict = old
            raise

    def _new_entry(self, name: str, layout: _Layout) -> _Entry:
        if not self._strict:
            return _Entry(layout)
        saved = self._saved_layout(layout)
        entry, taken = _Entry(saved), dict.fromkeys(saved.held(), 0)
        for held, begin, end, offset in saved.pieces():
            got = _copy_pieces(self._loaded.get(held, ()), begin, end, entry.committed[offset:])
            taken[held] += got
            if got != end - begin:
                raise _misfit(name, held, f"holds {got} of the elements {begin}..{end} that this rank owns")
        for held, owned in taken.items():
            found = sum(len(values) for _, values in self._loaded.get(held, ()))
            if found != owned:
                raise _misfit(name, held, f"holds {found} elements, this rank owns {owned}")
        for held in self._loaded.keys() - taken:
            if held.name in {span.name for span in layout.spans}:
                raise _misfit(name, held, "has no place: this rank compresses nothing there")
        for held in taken:
            self._loaded.pop(held, None)
        return entry if saved == layout else _moved(entry, layout)

    def _saved_layout(self, layout: _Layout) -> _Layout:
        """``layout`` as the loaded state has it: without what it does not hold, with a second residual that it has."""
        names = {span.name for span in layout.spans}
        saved = {held.op for held in self._loaded if held.name in names}
        parts = [(op, regions) for op, regions in layout.regions if op == _FIRST or op in saved]
        if _SECOND in saved and _SECOND not in dict(parts):
            pieces = sorted(
                (span.begin + begin, span.begin + begin + len(values))
                for span in layout.spans
                for begin, values in self._loaded.get(_Held(span.name, _SECOND), ())
            )
            parts.insert(1, (_SECOND, _joined(pieces)))
        return replace(layout, regions=tuple(parts))


def _follows(before: _Layout, after: _Layout) -> bool:
    """Whether ``after`` is ``before`` with other ops, none of which lose anything."""
    old, new = dict(before.regions), dict(after.regions)
    same = replace(before, regions=()) == replace(after, regions=())
    return (
        same
        and all(new.get(op, regions) == regions for op, regions in old.items())
        and old.keys() - new <= {_SECOND}
    )


def _moved(entry: _Entry, layout: _Layout) -> _Entry:
    """The committed values of ``entry`` in another layout: a second residual that has no place joins the first."""
    moved, places = _Entry(layout), dict(layout.regions)
    for op, regions in entry.layout.regions:
        values = entry.committed[entry.layout.size(op) :]
        for begin, end in regions:
            into = layout.size(op if op in places else _FIRST)
            for low, high in places.get(op) or places.get(_FIRST, ()):
                if low <= begin and end <= high:
                    moved.committed[into + begin - low :][: end - begin] += values[: end - begin]
                into += high - low
            values = values[end - begin :]
    return moved


def _joined(regions: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
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


def _copy_pieces(pieces: Iterable[tuple[int, FloatArray]], begin: int, end: int, out: FloatArray) -> int:
    got = 0
    for start, values in pieces:
        low, high = max(start, begin), min(start + len(values), end)
        if low < high:
            out[low - begin : high - begin] = values[low - start : high - start]
            got += high - low
    return got


def _misfit(entry: str, held: _Held, what: str) -> ResidualError:
    return ResidualError(
        f"residual state ({held.op}) of parameter {held.name!r} (bucket {entry!r}) {what}; it was saved by another "
        "rank or under another topology: load it where it was saved, or start a new Residual and lose it"
    )


def _describe(layout: _Layout) -> str:
    held = ", ".join(f"{op} {sum(e - b for b, e in regions)}" for op, regions in layout.regions)
    return f"({held or 'nothing'}) of {layout.numel} elements in {len(layout.spans)} spans"
