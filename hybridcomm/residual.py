"""Error feedback: what compression left out, kept until it is sent.

A residual belongs to (node, shard) and is in units of the unscaled node sum. The law it keeps, over any
number of steps:

    sum over steps and ranks of gradients = W * sum of applied mean updates + sum over nodes of residuals

Two buffers per entry, 2 * numel / L fp32 elements per rank: `commit` after the optimizer step was applied
keeps the new one, `rollback` when it was skipped keeps the old one.

Two variants keep a law of their own:

    decay d      e <- d * e + gradient - sent: the law holds with step t of T weighted by d^(T - t), on both sides
    momentum m   u <- m * u + gradient is fed back and sent in the gradient's place (Lin et al. 2018, arXiv
                 1712.01887): the law holds with the velocities u instead of the gradients. With ``masking`` an
                 element's velocity begins anew once something of it was sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybridcomm.bucket import Span
from hybridcomm.errors import ResidualError, UnsupportedError

__all__ = ["NO_FEEDBACK", "Residual", "Staged"]

FloatArray = NDArray[np.float32]

NO_FEEDBACK = (1.0, 0.0, True, 0, 0)
"""`Staged.feedback` of a call without a residual."""

_VELOCITY = ":velocity"  # behind the names of an entry, and of its spans, that holds velocities

_KEY = re.compile(r"(.*)\[(\d+):(\d+)\]", re.DOTALL)


@dataclass(frozen=True)
class _Layout:
    """Which elements of which flat tensor an entry holds: regions are ascending, disjoint, not adjacent."""

    numel: int
    regions: tuple[tuple[int, int], ...]
    spans: tuple[Span, ...]

    def pieces(self) -> Iterator[tuple[str, int, int, int]]:
        """(parameter, begin and end within the parameter, offset in the flat buffer) of all held elements."""
        offset = 0
        for begin, end in self.regions:
            for span in self.spans:
                low, high = max(begin, span.begin), min(end, span.end)
                if low < high:
                    yield span.name, low - span.begin, high - span.begin, offset + low - begin
            offset += end - begin


class _Entry:
    def __init__(self, layout: _Layout) -> None:
        size = sum(end - begin for begin, end in layout.regions)
        self.layout = layout
        self.committed: FloatArray = np.zeros(size, np.float32)
        self.spare: FloatArray = np.zeros(size, np.float32)
        self.staged = False


@dataclass(frozen=True, kw_only=True)
class Staged:
    """The buffers and settings of one call; ``velocity`` is (before, after), in the order of ``e_in``."""

    e_in: FloatArray
    e_out: FloatArray
    velocity: tuple[FloatArray, FloatArray] | None
    decay: float
    momentum: float
    masking: bool

    @property
    def arrays(self) -> tuple[FloatArray, ...]:
        return (self.e_in, self.e_out, *(self.velocity or ()))

    @property
    def feedback(self) -> tuple[float, float, bool, int, int]:
        """As the engine takes it (csrc/bind_engine.cpp)."""
        before, after = (array.ctypes.data for array in self.velocity) if self.velocity else (0, 0)
        return self.decay, self.momentum, self.masking, before, after


class Residual:
    """Owns the error-feedback buffers of one or more tensors; what a caller keeps between steps.

    A caller who never commits just carries on: each call compensates with what the last one left. A caller
    who may skip steps calls `commit` or `rollback` once per optimizer step, for all entries at once.

    ``decay`` in (0, 1]: 1 keeps all, less lets old steps fade. ``momentum`` in [0, 1): momentum correction, for
    sparse codecs (others send something of every element, and masking then leaves no velocity); take it out of
    the optimizer for the parameters that are compressed. It doubles the memory. ``masking``: see above; it keeps
    late gradients from pushing on. Raises `UnsupportedError` for a value out of range.
    """

    def __init__(self, *, decay: float = 1.0, momentum: float = 0.0, masking: bool = True) -> None:
        if not 0.0 < decay <= 1.0:
            raise UnsupportedError(f"decay={decay}: above 0, at most 1 (which keeps all)")
        if not 0.0 <= momentum < 1.0:
            raise UnsupportedError(f"momentum={momentum}: at least 0 (none), below 1")
        self.decay, self.momentum, self.masking = decay, momentum, masking
        self._entries: dict[str, _Entry] = {}
        self._loaded: dict[str, list[tuple[int, FloatArray]]] = {}
        self._strict = False  # a state was loaded: what it does not hold is an error, not a zero

    @property
    def settings(self) -> str:
        """What must be equal on all ranks, as text."""
        return f"decay={self.decay:g} momentum={self.momentum:g} masking={self.masking}"

    def stage(
        self,
        name: str,
        *,
        numel: int,
        regions: Sequence[tuple[int, int]],
        spans: Sequence[Span] | None = None,
    ) -> tuple[FloatArray, FloatArray]:
        """The buffers for one encode of tensor ``name``: ``(e_in, e_out)``, fp32, 1-D.

        Both are the concatenation of ``regions`` (`Plan.residual_regions`) of a flat tensor of ``numel``
        elements. ``spans`` say which parameter each element belongs to (default: all to ``name``). The first
        stage since commit or rollback reads the committed buffer; later ones continue in place (e_in is
        e_out).

        Raises `ResidualError` when ``name`` was used with another layout, or a loaded state does not fit it.
        """
        layout = _Layout(numel, _joined(regions), tuple(spans or (Span(name, 0, numel),)))
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = self._new_entry(name, layout)
        elif entry.layout != layout:
            raise ResidualError(
                f"residual of {name!r} holds {_describe(entry.layout)}, now asked for {_describe(layout)}; "
                "keep one Residual per tensor and topology, or start a new one"
            )
        before = entry.spare if entry.staged else entry.committed
        entry.staged = True
        return before, entry.spare

    def prepare(
        self,
        name: str,
        *,
        numel: int,
        regions: Sequence[tuple[int, int]],
        spans: Sequence[Span] | None = None,
    ) -> Staged:
        """`stage`, and with momentum the velocity's buffers beside the residual's."""
        e_in, e_out = self.stage(name, numel=numel, regions=regions, spans=spans)
        velocity = None
        if self.momentum:
            own = [Span(span.name + _VELOCITY, *span[1:]) for span in spans or (Span(name, 0, numel),)]
            velocity = self.stage(name + _VELOCITY, numel=numel, regions=regions, spans=own)
        return Staged(
            e_in=e_in,
            e_out=e_out,
            velocity=velocity,
            decay=self.decay,
            momentum=self.momentum,
            masking=self.masking,
        )

    def deliver(
        self,
        name: str,
        flat: FloatArray,
        *,
        regions: Sequence[tuple[int, int]],
        spans: Sequence[Span] | None = None,
    ) -> None:
        """A dense step follows: adds to ``flat`` what compressed steps left here, and stages an empty residual.

        ``flat`` is this rank's share of the dense sum. One rank of a node holds an element's residual, so the
        sum delivers it once per node. ``regions`` and ``spans`` as in `stage`. Raises `UnsupportedError` with
        ``momentum``: a dense sum does not tell that of a node, which the velocity is made of.
        """
        if self.momentum:
            raise UnsupportedError(
                "momentum= cannot be kept up over a dense step: begin with 'topk:0.25' or so"
            )
        if name not in self._entries and not self._strict:
            return  # no step was compressed yet
        e_in, e_out = self.stage(name, numel=flat.size, regions=regions, spans=spans)
        offset = 0
        for begin, end in regions:
            left = e_in[offset : offset + end - begin]
            flat[begin:end] += left if self.decay == 1.0 else np.float32(self.decay) * left
            offset += end - begin
        e_out.fill(0)

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
        return tuple(self._loaded)

    def state_dict(self) -> dict[str, FloatArray]:
        """This rank's committed residual: ``"parameter[begin:end]"`` -> fp32 1-D copy, and with momentum
        ``"parameter:velocity[begin:end]"``.

        Keyed by span of the parameter, so that it outlives another bucket size. What is staged is not saved:
        it belongs to a step that the saved parameters have not seen.
        """
        state = {
            f"{name}[{begin}:{begin + len(values)}]": values.copy()
            for name, pieces in self._loaded.items()
            for begin, values in pieces
        }
        for entry in self._entries.values():
            for name, begin, end, offset in entry.layout.pieces():
                state[f"{name}[{begin}:{end}]"] = entry.committed[offset : offset + end - begin].copy()
        return state

    def load_state_dict(self, state: Mapping[str, FloatArray]) -> None:
        """Replaces everything with a state of the same rank; buckets may have other names and chunk sizes.

        Raises `ResidualError`, at once or at the next `stage`, where this rank owns other elements than the
        state holds: another topology, or shards that fall elsewhere.
        """
        loaded: dict[str, list[tuple[int, FloatArray]]] = {}
        for key, values in state.items():
            match = _KEY.fullmatch(key)
            array = np.asarray(values)
            if match is None or array.dtype != np.float32 or array.ndim != 1:
                raise ResidualError(f"state entry {key!r}: expected 'parameter[begin:end]' -> 1-D float32")
            if int(match[3]) - int(match[2]) != array.size:
                raise ResidualError(f"state entry {key!r} holds {array.size} elements; is the file damaged?")
            loaded.setdefault(match[1], []).append((int(match[2]), array.copy()))
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
        entry = _Entry(layout)
        if not self._strict:
            return entry
        taken: dict[str, int] = {}
        for span, begin, end, offset in layout.pieces():
            got = _copy_pieces(self._loaded.get(span, ()), begin, end, entry.committed[offset:])
            taken[span] = taken.get(span, 0) + got
            if got != end - begin:
                raise _misfit(name, span, f"holds {got} of the elements {begin}..{end} that this rank owns")
        for span in {span.name for span in layout.spans}:
            held = sum(len(values) for _, values in self._loaded.get(span, ()))
            if held != taken.get(span, 0):
                raise _misfit(name, span, f"holds {held} elements, this rank owns {taken.get(span, 0)}")
        for span in {span.name for span in layout.spans}:
            self._loaded.pop(span, None)
        return entry


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


def _misfit(entry: str, parameter: str, what: str) -> ResidualError:
    return ResidualError(
        f"residual state of parameter {parameter!r} (bucket {entry!r}) {what}; it was saved by another "
        "rank or under another topology: load it where it was saved, or start a new Residual and lose it"
    )


def _describe(layout: _Layout) -> str:
    return f"{sum(e - b for b, e in layout.regions)} of {layout.numel} elements in {len(layout.spans)} spans"
