"""Launching a kernel: arguments to bytes, CTAs to frames, counters back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.ptx import types
from tests.ptx.access import Traffic
from tests.ptx.control import Scheduler
from tests.ptx.errors import PtxError, Reason
from tests.ptx.flow import compile_entry
from tests.ptx.frame import WARP, Frame, Geometry
from tests.ptx.memory import Memory
from tests.ptx.parse import Entry, Parameter, parse

__all__ = ["Counters", "Kernel"]

Argument = int | float | bytes
Extent = int | tuple[int, int, int]
LIMIT = 200_000  # instructions in a row of one frame
LANES = 8192  # of a frame: what numpy gains by length, caches lose


@dataclass(kw_only=True)
class Counters:
    """What a launch did. ``opcodes``: instructions executed by threads, by spelling, those under a false guard
    included; ``traffic``: by ``ld.global``, ``st.global``, ``atom.global``, ``ld.shared``, ...; ``barriers``:
    of CTAs; ``moved``: `Memory.moved`."""

    opcodes: Counter[str] = field(default_factory=Counter)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    barriers: int = 0
    moved: int = 0

    @property
    def instructions(self) -> int:
        """Executed by threads, in all."""
        return sum(self.opcodes.values())

    @property
    def loaded(self) -> Traffic:
        """From global memory."""
        return self.traffic.get("ld.global", Traffic())

    @property
    def stored(self) -> Traffic:
        """To global memory."""
        return self.traffic.get("st.global", Traffic())


def _bytes_of(parameter: Parameter, value: Argument) -> bytes:
    """One argument as the kernel reads it."""
    if parameter.type == "bytes" or isinstance(value, bytes):
        if not isinstance(value, bytes) or len(value) != parameter.nbytes:
            raise PtxError(
                Reason.ARGUMENTS, f"{parameter.name}: {parameter.nbytes} bytes wanted, got {value!r}"
            )
        return value
    if parameter.type[0] == "f":
        return np.asarray(value, types.dtype(parameter.type)).tobytes()
    width = 8 * parameter.nbytes
    if not isinstance(value, (int, np.integer)) or not -(1 << (width - 1)) <= value < 1 << width:
        raise PtxError(
            Reason.ARGUMENTS, f"{parameter.name}: an integer of {width} bits wanted, got {value!r}"
        )
    return (int(value) & ((1 << width) - 1)).to_bytes(parameter.nbytes, "little")


def pack_arguments(entry: Entry, arguments: Sequence[Argument]) -> bytes:
    """The parameter bytes. Pointers behind the last argument (Triton's scratch memory) are null: using one is an error.

    Raises:
        PtxError: ARGUMENTS.
    """
    rest = entry.parameters[len(arguments) :]
    if len(arguments) > len(entry.parameters) or not all(parameter.pointer for parameter in rest):
        raise PtxError(Reason.ARGUMENTS, f"{len(entry.parameters)} wanted, got {len(arguments)}")
    packed = bytearray()
    for parameter, value in zip(entry.parameters, [*arguments, *[0] * len(rest)], strict=True):
        packed += bytes(parameter.offset - len(packed)) + _bytes_of(parameter, value)
    return bytes(packed)


def _extent(size: Extent) -> tuple[int, int, int]:
    return (size, 1, 1) if isinstance(size, int) else size


class Kernel:
    """An entry that can be launched. Of a text every instruction is looked at, of an ``Entry`` those that are reached.

    Raises:
        PtxError: SYNTAX or UNSUPPORTED, for text that is not understood.
    """

    def __init__(self, ptx: str | Entry, entry: str | None = None) -> None:
        self.program = compile_entry(parse(ptx, entry) if isinstance(ptx, str) else ptx)
        if isinstance(ptx, str):
            one = Geometry(grid=(1, 1, 1), block=(WARP, 1, 1))
            nothing = bytes(sum(parameter.offset + parameter.nbytes for parameter in self.entry.parameters))
            scheduler = Scheduler(self.program, Frame(self.entry, Memory(), nothing, one, 0, 1), {}, 0)
            for number in range(len(self.program.blocks)):
                scheduler.bind(number)

    @property
    def entry(self) -> Entry:
        return self.program.entry

    def launch(
        self,
        memory: Memory,
        arguments: Sequence[Argument],
        *,
        grid: Extent,
        block: Extent | None = None,
        shared: int = 0,
        limit: int = LIMIT,
    ) -> Counters:
        """Run all CTAs to their end.

        ``grid``, ``block``: CTAs and threads, or (x, y, z); the block may be the one that the text requires.
        ``shared``: bytes of dynamic shared memory per CTA. ``limit``: instructions in a row before a loop counts as
        endless.

        Raises:
            PtxError: any finding; ``memory`` is then as the kernel left it.
        """
        required = self.entry.block
        threads = _extent(required or 0 if block is None else block)
        geometry = Geometry(grid=_extent(grid), block=threads, shared=shared)
        if (
            geometry.threads % WARP
            or not 0 < geometry.threads <= 1024
            or required not in (None, geometry.threads)
        ):
            raise PtxError(
                Reason.ARGUMENTS, f"a block of {threads}: whole warps wanted, or what .reqntid says"
            )
        if not 0 <= geometry.ctas < 1 << 20:
            raise PtxError(Reason.ARGUMENTS, f"a grid of {geometry.ctas} CTAs is more than a stamp can name")
        packed, counters = pack_arguments(self.entry, arguments), Counters()
        memory.begin()
        at_once = max(1, LANES // geometry.threads)
        with np.errstate(all="ignore"):
            for first in range(0, geometry.ctas, at_once):
                count = min(at_once, geometry.ctas - first)
                frame = Frame(self.entry, memory, packed, geometry, first, count)
                scheduler = Scheduler(self.program, frame, counters.traffic, limit)
                scheduler.run()
                counters.opcodes += scheduler.opcodes()
                counters.barriers += scheduler.barriers
        counters.moved = memory.moved()
        return counters
