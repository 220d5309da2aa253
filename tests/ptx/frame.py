"""The threads of some CTAs at once: registers, who is who, what time it is for whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.ptx import races, types
from tests.ptx.errors import AccessError, PtxError, Reason
from tests.ptx.memory import Memory, Region
from tests.ptx.operands import Immediate, Operand, Register, Special, Symbol
from tests.ptx.parse import Entry, Instruction
from tests.ptx.races import Stamps
from tests.ptx.types import Array, Bools

__all__ = ["SHARED_BASE", "Frame", "Geometry", "Step"]

Step = Callable[["Bools | None"], None]
"""Executes an instruction for the lanes of the mask; None stands for all."""

SHARED_BASE = 1024  # shared addresses begin here, so that a null pointer or a bare offset hits nothing
WARP = 32


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Numbers of CTAs and threads in x, y, z; ``shared``: dynamic shared bytes per CTA."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int = 0

    @property
    def ctas(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]


class Frame:
    """State of the CTAs ``first`` to ``first + count``; a lane is one thread."""

    def __init__(
        self, entry: Entry, memory: Memory, parameters: bytes, geometry: Geometry, first: int, count: int
    ) -> None:
        threads = geometry.threads
        self.entry, self.memory, self.parameters, self.geometry = entry, memory, parameters, geometry
        self.first, self.count, self.lanes = first, count, count * threads
        self.cta = np.repeat(np.arange(first, first + count), threads)
        self.thread = np.tile(np.arange(threads), count)
        self.local = self.cta - first
        self.warp = self.local * (threads // WARP) + self.thread // WARP
        self.lane = self.thread % WARP
        self.registers = {name: types.storage(kind, self.lanes) for name, kind in entry.registers.items()}
        who = (self.cta + 1) << races.CTA_SHIFT | (self.thread // WARP) << races.WARP_SHIFT | self.lane
        self.who: Stamps = who.astype(np.uint64)
        self.epochs = np.zeros(count, np.int64)
        self.warp_epochs = np.zeros(count * (threads // WARP), np.int64)
        self.stamps: Stamps = self.who.copy()
        self.shared_nbytes = entry.static_shared + geometry.shared
        self.shared_stride = -(-max(self.shared_nbytes, 1) // 32) * 32
        nothing = np.zeros(self.shared_stride * count, np.uint8)
        self.shared = Region(nothing, nothing, "shared memory")
        self.shared.shadow = races.Shadow(nothing.size, Reason.SHARED_RACE)

    def tick(self) -> None:
        """Make the stamps say the present epochs."""
        if int(self.warp_epochs.max()) >= 1 << 12 or int(self.epochs.max()) >= 1 << 20:
            raise PtxError(Reason.UNSUPPORTED, "more barriers than a stamp can count")
        when = (
            self.epochs[self.local] << races.EPOCH_SHIFT
            | self.warp_epochs[self.warp] << races.WARP_EPOCH_SHIFT
        )
        self.stamps = self.who | when.astype(np.uint64)

    def error(self, instruction: Instruction, reason: Reason, message: str, lane: int) -> PtxError:
        return PtxError(
            reason,
            message,
            line=instruction.line,
            text=instruction.text,
            cta=int(self.cta[lane]),
            thread=int(self.thread[lane]),
        )

    def located(self, instruction: Instruction, fault: AccessError, lanes: Array | None) -> PtxError:
        """A fault that names a position among ``lanes`` (None: all) as an error that names a thread."""
        lane = fault.position if lanes is None else int(lanes[fault.position])
        return self.error(instruction, fault.reason, fault.message, lane)

    def _special(self, name: str) -> Any:
        name = name[1:]
        if name.startswith("lanemask"):
            lane = np.uint64(1) << self.lane.astype(np.uint64)
            masks = {"eq": lane, "lt": lane - 1, "le": 2 * lane - 1, "gt": ~(2 * lane - 1), "ge": ~(lane - 1)}
            return masks[name[-2:]].astype(np.uint32)
        if name in ("laneid", "warpid"):
            return (self.lane if name == "laneid" else self.thread // WARP).astype(np.uint32)
        if name == "nwarpid":
            return np.uint32(self.geometry.threads // WARP)
        kind, axis = name.split(".")
        place = "xyz".index(axis)
        sizes = self.geometry.block if kind.endswith("tid") and "cta" not in kind else self.geometry.grid
        if kind.startswith("n"):
            return np.uint32(sizes[place])
        flat = self.thread if kind == "tid" else self.cta
        return (flat // int(np.prod(sizes[:place], dtype=np.int64)) % sizes[place]).astype(np.uint32)

    def _symbol(self, instruction: Instruction, name: str) -> int:
        variable = self.entry.shared.get(name)
        if variable is None:
            raise instruction.error(Reason.UNSUPPORTED, f"{name} is no shared variable")
        offset = self.entry.static_shared if variable.nbytes is None else variable.offset
        return SHARED_BASE + offset

    def source(self, instruction: Instruction, operand: Operand, kind: str, *, wide: bool = False) -> Any:
        """A view of a register as ``kind``, or a scalar; ``wide``: the register may have more bits, low ones count."""
        if isinstance(operand, Register):
            register, declared = self.registers[operand.name], self.entry.registers[operand.name]
            if (kind == "pred") != (declared == "pred") or (operand.negated and kind != "pred"):
                raise instruction.error(Reason.SYNTAX, f"{operand.name} is .{declared}, .{kind} wanted")
            have, want = types.bits(declared), types.bits(kind)
            if have == want:
                return types.view(register, kind)
            if wide and have > want and have <= 64:
                parts = register.view(f"u{want // 8}").reshape(self.lanes, -1)[:, 0]
                return parts.view(types.dtype(kind)) if types.packed(kind)[1] == 1 else None
            raise instruction.error(Reason.SYNTAX, f"{operand.name} has {have} bits, .{kind} wanted")
        return self._constant(instruction, operand, kind)

    def _constant(self, instruction: Instruction, operand: Operand, kind: str) -> Any:
        if isinstance(operand, Special):
            value = self._special(operand.name)
            if types.bits(kind) not in (16, 32, 64) or kind[0] == "f":
                raise instruction.error(Reason.SYNTAX, f"{operand.name} as .{kind}")
            return value.astype(types.dtype(kind))
        if isinstance(operand, Symbol):
            return types.dtype(kind).type(self._symbol(instruction, operand.name))
        if isinstance(operand, Immediate) and kind == "pred":
            return np.bool_(operand.value != 0)
        if not isinstance(operand, Immediate) or types.packed(kind)[1] > 1:
            raise instruction.error(Reason.SYNTAX, f"an operand that cannot be .{kind}")
        width = types.bits(kind)
        fits = kind[0] == "b" or (operand.float_bits != 0) == (kind[0] == "f")
        if operand.float_bits not in (0, width) or not fits:
            raise instruction.error(Reason.SYNTAX, f"a constant that is no .{kind}")
        if not -(1 << width) < operand.value < 1 << width:
            raise instruction.error(Reason.SYNTAX, f"a constant that does not fit .{kind}")
        raw = np.array(operand.value & ((1 << width) - 1), f"u{width // 8}")
        return raw.view(types.dtype(kind))[()]

    def reader(
        self, instruction: Instruction, operand: Operand, kind: str, *, wide: bool = False
    ) -> Callable[[], Any]:
        """What reads ``operand`` when it is called; only negated predicates need more than a view."""
        values = self.source(instruction, operand, kind, wide=wide)
        if isinstance(operand, Register) and operand.negated:
            return lambda: ~values
        return lambda: values

    def writer(self, instruction: Instruction, operand: Operand, kind: str, *, wide: bool = False) -> Writer:
        """Where results of type ``kind`` go; a wider register takes them extended by the type's sign."""
        if not isinstance(operand, Register) or operand.negated:
            raise instruction.error(Reason.SYNTAX, "the destination is no register")
        register, declared = self.registers[operand.name], self.entry.registers[operand.name]
        if (kind == "pred") != (declared == "pred"):
            raise instruction.error(Reason.SYNTAX, f"{operand.name} is .{declared}, .{kind} wanted")
        have, want = types.bits(declared), types.bits(kind)
        if have == want:
            return types.view(register, kind)
        if wide and 64 >= have > want and kind[0] in "bus":
            return register.view(f"{'i' if kind[0] == 's' else 'u'}{have // 8}")
        raise instruction.error(Reason.SYNTAX, f"{operand.name} has {have} bits, .{kind} wanted")


Writer = npt.NDArray[Any]


def put(target: Writer, values: Any, mask: Bools | None) -> None:
    """Assign to the lanes of the mask."""
    if mask is None:
        target[...] = values
    else:
        np.copyto(target, values, where=mask[:, None] if target.ndim == 2 else mask, casting="unsafe")


def active(mask: Bools | None, count: int) -> Sequence[int] | Array:
    """Indices of the lanes of a mask."""
    return np.arange(count) if mask is None else np.flatnonzero(mask)
