"""Error feedback: what compression left out, kept until it is sent.

A residual belongs to (node, shard) and is in units of the unscaled node sum. A two-stage exchange has a second
one: what was left out when the sum of a slice was encoded anew. It belongs to the slice and lives with its owner,
in the same units: payloads are added as they are, and the mean is taken last. Compression inside a node has a
third: of a rank and what it does not own, in units of its gradient. The law, over any number of steps:

    sum over steps and ranks of gradients = W * sum of applied mean updates + sum of all residuals

Two buffers per entry, 2 * numel / L fp32 elements per rank (the second stage's: a node's part of that): `commit`
after the optimizer step was applied keeps the new one, `rollback` when it was skipped keeps the old one.

Two variants keep a law of their own:

    decay d      e <- d * e + gradient - sent: the law holds with step t of T weighted by d^(T - t), on both sides
    momentum m   u <- m * u + gradient is fed back and sent in the gradient's place (Lin et al. 2018, arXiv
                 1712.01887): the law holds with the velocities u instead of the gradients. With ``masking`` an
                 element's velocity begins anew once something of it was sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from hybridcomm.bucket import Span
from hybridcomm.errors import ResidualError, UnsupportedError
from hybridcomm.residual_layout import (
    FIRST,
    KEY,
    SECOND,
    FloatArray,
    Held,
    Layout,
    RegionsByOp,
    by_op,
    copy_pieces,
    describe,
    follows,
    joined,
    misfit,
    moved,
)
from hybridcomm.residual_memory import HOST, ResidualMemory

__all__ = ["NO_FEEDBACK", "Residual", "Staged"]

NO_FEEDBACK = (1.0, 0.0, True, 0, 0)
"""`Staged.feedback` of a call without a residual."""

_VELOCITY = ":velocity"  # behind the names of an entry, and of its spans, that holds velocities


class _Entry:
    """Two buffers in ``memory``; ``committed``: what the first one begins with."""

    def __init__(
        self, layout: Layout, committed: FloatArray | None = None, memory: ResidualMemory = HOST
    ) -> None:
        self.layout = layout
        self.committed = memory.zeros(layout.size()) if committed is None else memory.from_host(committed)
        self.spare = memory.zeros(layout.size())
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
        self._memory: ResidualMemory = HOST
        self._entries: dict[str, _Entry] = {}
        self._loaded: dict[Held, list[tuple[int, FloatArray]]] = {}
        self._strict = False  # a state was loaded: what it does not hold is an error, not a zero

    @property
    def settings(self) -> str:
        """What must be equal on all ranks, as text."""
        return f"decay={self.decay:g} momentum={self.momentum:g} masking={self.masking}"

    def place(self, memory: ResidualMemory) -> None:
        """Where buffers lie from now on; those that are there move.

        Raises `ResidualError` while something is staged.
        """
        if memory is self._memory:
            return
        if self.pending:
            raise ResidualError("a residual cannot move to a device between an all-reduce and its commit()")
        for entry in self._entries.values():
            entry.committed = memory.from_host(self._memory.to_host(entry.committed))
            entry.spare = memory.zeros(entry.layout.size())
        self._memory = memory

    def stage(
        self,
        name: str,
        *,
        numel: int,
        regions: RegionsByOp,
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
        whole = ((op, joined(parts)) for op, parts in by_op(regions).items())
        kept = tuple((op, parts) for op, parts in whole if parts)
        layout = Layout(numel, tuple(spans or (Span(name, 0, numel),)), kept)
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = self._new_entry(name, layout)
        elif entry.layout != layout:
            if entry.staged or not follows(entry.layout, layout):
                raise ResidualError(
                    f"residual of {name!r} holds {describe(entry.layout)}, now asked for {describe(layout)}; "
                    "keep one Residual per tensor and topology, or start a new one"
                )
            values = moved(self._memory.to_host(entry.committed), entry.layout, layout)
            entry = self._entries[name] = _Entry(layout, values, self._memory)
        before = entry.spare if entry.staged else entry.committed
        entry.staged = True
        return before, entry.spare

    def prepare(
        self,
        name: str,
        *,
        numel: int,
        regions: RegionsByOp,
        spans: Sequence[Span] | None = None,
    ) -> Staged:
        """`stage`, and with momentum the velocity's buffers beside the residual's: of what "compress" sends, and only
        that, which comes first in both.
        """
        e_in, e_out = self.stage(name, numel=numel, regions=regions, spans=spans)
        velocity = None
        if self.momentum:
            own = [Span(span.name + _VELOCITY, *span[1:]) for span in spans or (Span(name, 0, numel),)]
            first = by_op(regions)[FIRST]
            velocity = self.stage(name + _VELOCITY, numel=numel, regions=first, spans=own)
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
        flat: Any,
        *,
        regions: RegionsByOp,
        spans: Sequence[Span] | None = None,
    ) -> None:
        """A dense step follows: adds to ``flat`` what compressed steps left here, and stages an empty residual.

        ``flat``, an array or a device's tensor, is this rank's share of the dense sum. One rank of a node holds an
        element's residual, so the sum delivers it once per node. ``regions`` and ``spans`` as in `stage`. Raises
        `UnsupportedError` with ``momentum``: a dense sum does not tell that of a node, which the velocity is made of.
        """
        if self.momentum:
            raise UnsupportedError(
                "momentum= cannot be kept up over a dense step: begin with 'topk:0.25' or so"
            )
        if name not in self._entries and not self._strict:
            return  # no step was compressed yet
        e_in, e_out = self.stage(name, numel=len(flat), regions=regions, spans=spans)
        offset = 0
        for begin, end in chain.from_iterable(by_op(regions).values()):
            self._memory.add(flat[begin:end], e_in[offset : offset + end - begin], self.decay)
            offset += end - begin
        self._memory.clear(e_out)

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
        """This rank's committed residual: ``"parameter[begin:end]"`` -> fp32 1-D copy, and with momentum
        ``"parameter:velocity[begin:end]"``.

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
            values = self._memory.to_host(entry.committed)
            for held, begin, end, offset in entry.layout.pieces():
                state[held.key(begin, end)] = values[offset : offset + end - begin].copy()
        return state

    def load_state_dict(self, state: Mapping[str, FloatArray]) -> None:
        """Replaces everything with a state of the same rank; buckets may have other names and chunk sizes.

        Raises `ResidualError`, at once or at the next `stage`, where this rank owns other elements than the
        state holds: another topology, or shards that fall elsewhere.
        """
        loaded: dict[Held, list[tuple[int, FloatArray]]] = {}
        for key, values in state.items():
            match = KEY.fullmatch(key)
            array = np.asarray(values)
            if match is None or array.dtype != np.float32 or array.ndim != 1:
                raise ResidualError(f"state entry {key!r}: expected 'parameter[begin:end]' -> 1-D float32")
            if int(match[3]) - int(match[2]) != array.size:
                raise ResidualError(f"state entry {key!r} holds {array.size} elements; is the file damaged?")
            loaded.setdefault(Held(match[1], match[4] or FIRST), []).append((int(match[2]), array.copy()))
        layouts = {name: entry.layout for name, entry in self._entries.items()}
        old = self._entries, self._loaded, self._strict
        self._entries, self._loaded, self._strict = {}, loaded, True
        try:
            for name, layout in layouts.items():
                self._entries[name] = self._new_entry(name, layout)
        except ResidualError:
            self._entries, self._loaded, self._strict = old
            raise

    def _new_entry(self, name: str, layout: Layout) -> _Entry:
        if not self._strict:
            return _Entry(layout, memory=self._memory)
        saved = self._saved_layout(layout)
        values, taken = np.zeros(saved.size(), np.float32), dict.fromkeys(saved.held(), 0)
        for held, begin, end, offset in saved.pieces():
            got = copy_pieces(self._loaded.get(held, ()), begin, end, values[offset:])
            taken[held] += got
            if got != end - begin:
                raise misfit(name, held, f"holds {got} of the elements {begin}..{end} that this rank owns")
        for held, owned in taken.items():
            found = sum(len(values) for _, values in self._loaded.get(held, ()))
            if found != owned:
                raise misfit(name, held, f"holds {found} elements, this rank owns {owned}")
        for held in self._loaded.keys() - taken:
            if held.name in {span.name for span in layout.spans}:
                raise misfit(name, held, "has no place: this rank compresses nothing there")
        for held in taken:
            self._loaded.pop(held, None)
        return _Entry(layout, values if saved == layout else moved(values, saved, layout), self._memory)

    def _saved_layout(self, layout: Layout) -> Layout:
        """``layout`` as the loaded state has it: without what it does not hold, with a second residual that it has."""
        names = {span.name for span in layout.spans}
        saved = {held.op for held in self._loaded if held.name in names}
        parts = [(op, regions) for op, regions in layout.regions if op == FIRST or op in saved]
        if SECOND in saved and SECOND not in dict(parts):
            pieces = sorted(
                (span.begin + begin, span.begin + begin + len(values))
                for span in layout.spans
                for begin, values in self._loaded.get(Held(span.name, SECOND), ())
            )
            parts.insert(1, (SECOND, joined(pieces)))
        return replace(layout, regions=tuple(parts))
