"""Error feedback: what compression left out, kept until it is sent.

A residual belongs to (node, shard) and is in units of the unscaled node sum. A two-stage exchange has a second
one: what was left out when the sum of a slice was encoded anew. It belongs to the slice and lives with its owner,
in the same units: payloads are added as they are, and the mean is taken last. The law, over any number of steps:

    sum over steps and ranks of gradients
        = W * sum of applied mean updates + sum over nodes of residuals + sum over slices of second residuals

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

__all__ = ["Residual"]

FloatArray = NDArray[np.float32]

_SECOND = " recompress"
_KEY = re.compile(rf"(.*)\[(\d+):(\d+)\]({_SECOND}|)", re.DOTALL)


class _Held(NamedTuple):
    """Whose residual it is: a parameter's, and "" or, of the second stage, `_SECOND`."""

    name: str
    stage: str

    def key(self, begin: int, end: int) -> str:
        return f"{self.name}[{begin}:{end}]{self.stage}"


@dataclass(frozen=True)
class _Layout:
    """Which elements of which flat tensor an entry holds: regions are ascending, disjoint, not adjacent.

    Those of the second stage, ``second``, follow behind ``regions``, of which they are parts.
    """

    numel: int
    regions: tuple[tuple[int, int], ...]
    spans: tuple[Span, ...]
    second: tuple[tuple[int, int], ...] = ()

    def pieces(self) -> Iterator[tuple[_Held, int, int, int]]:
        """(whose, begin and end within the parameter, offset in the flat buffer) of all held elements."""
        offset = 0
        for stage, regions in (("", self.regions), (_SECOND, self.second)):
            for begin, end in regions:
                for span in self.spans:
                    low, high = max(begin, span.begin), min(end, span.end)
                    if low < high:
                        held = _Held(span.name, stage)
                        yield held, low - span.begin, high - span.begin, offset + low - begin
                offset += end - begin

    def held(self) -> set[_Held]:
        """All whose residuals may be here."""
        stages = ("", _SECOND) if self.second else ("",)
        return {_Held(span.name, stage) for span in self.spans for stage in stages}


class _Entry:
    def __init__(self, layout: _Layout) -> None:
        size = sum(end - begin for begin, end in layout.regions + layout.second)
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
        regions: Sequence[tuple[int, int]],
        spans: Sequence[Span] | None = None,
        second: Sequence[tuple[int, int]] = (),
    ) -> tuple[FloatArray, FloatArray]:
        """The buffers for one encode of tensor ``name``: ``(e_in, e_out)``, fp32, 1-D.

        Both are the concatenation of ``regions`` (`Plan.residual_regions`) of a flat tensor of ``numel``
        elements, and behind them of ``second``, those of a two-stage exchange's second residual. ``spans`` say
        which parameter each element belongs to (default: all to ``name``). The first stage since commit or
        rollback reads the committed buffer; later ones continue in place (e_in is e_out).

        A tensor whose exchange changes to two stages begins with a second residual of zeros; one whose exchange
        changes back gets the second residual added to the first: both are in the same units.

        Raises `ResidualError` when ``name`` was used with another layout, or a loaded state does not fit it.
        """
        spans = tuple(spans or (Span(name, 0, numel),))
        layout = _Layout(numel, _joined(regions), spans, _joined(second))
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = self._new_entry(name, layout)
        elif not entry.staged and entry.layout != layout and _other_exchange(entry.layout, layout):
            entry = self._entries[name] = _moved(entry, layout)
        elif entry.layout != layout:
            raise ResidualError(
                f"residual of {name!r} holds {_describe(entry.layout)}, now asked for {_describe(layout)}; "
                "keep one Residual per tensor and topology, or start a new one"
            )
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

        The second residual of a two-stage exchange has keys that end in " recompress".
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
            loaded.setdefault(_Held(match[1], match[4]), []).append((int(match[2]), array.copy()))
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
        for held in taken:
            self._loaded.pop(held, None)
        return entry if saved == layout else _moved(entry, layout)

    def _saved_layout(self, layout: _Layout) -> _Layout:
        """``layout`` under the exchange that the loaded state was saved under."""
        seconds = [span for span in layout.spans if _Held(span.name, _SECOND) in self._loaded]
        if not seconds:
            return replace(layout, second=())
        if layout.second:
            return layout
        pieces = sorted(
            (span.begin + begin, span.begin + begin + len(values))
            for span in seconds
            for begin, values in self._loaded[_Held(span.name, _SECOND)]
        )
        return replace(layout, second=_joined(pieces))


def _other_exchange(before: _Layout, after: _Layout) -> bool:
    """Whether all that differs is that one of the two has no second residual."""
    return replace(before, second=()) == replace(after, second=()) and not (before.second and after.second)


def _moved(entry: _Entry, layout: _Layout) -> _Entry:
    """The committed values of ``entry`` under another exchange: a second residual is taken up by the first."""
    moved, offset = _Entry(layout), 0
    first = {}
    for begin, end in entry.layout.regions:
        first[begin, end] = offset
        offset += end - begin
    moved.committed[:offset] = entry.committed[:offset]
    for begin, end in entry.layout.second:
        into = next((at + begin - b for (b, e), at in first.items() if b <= begin and end <= e), None)
        if into is None:
            raise ResidualError(f"second residual of {begin}..{end} is no part of {_describe(layout)}")
        moved.committed[into : into + end - begin] += entry.committed[offset : offset + end - begin]
        offset += end - begin
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
        f"residual state of parameter {held.name!r}{held.stage} (bucket {entry!r}) {what}; it was saved by another "
        "rank or under another topology: load it where it was saved, or start a new Residual and lose it"
    )


def _describe(layout: _Layout) -> str:
    held = sum(end - begin for begin, end in layout.regions)
    second = sum(end - begin for begin, end in layout.second)
    text = f"{held} of {layout.numel} elements in {len(layout.spans)} spans"
    return f"{text}, {second} of a second stage" if second else text
