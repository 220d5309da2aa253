"""ld and st: addresses, widths, and what they count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.ptx import types
from tests.ptx.errors import AccessError, Reason
from tests.ptx.frame import SHARED_BASE, Frame, Step, put
from tests.ptx.memory import Offsets, Region
from tests.ptx.operands import Address, Operand, Register, Sink, Symbol, Vector
from tests.ptx.parse import Instruction
from tests.ptx.types import Array, Bools

__all__ = ["Traffic", "addresses_of", "bind", "place", "shared_offsets", "space_of"]

SEMANTICS = {"relaxed", "acquire", "release", "acq_rel", "weak", "volatile"}
SCOPES = {"cta", "cluster", "gpu", "sys"}
_CACHE = {
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "nc",
    "L1::evict_normal",
    "L1::evict_unchanged",
    "L1::evict_first",
}
_CACHE |= {"L1::evict_last", "L1::no_allocate", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"}
SPACES = {"global": "global", "shared": "shared", "shared::cta": "shared", "param": "param"}


@dataclass(kw_only=True)
class Traffic:
    """Bytes that instructions of active threads ask for; what memory moves for them, `Memory.moved` counts."""

    nbytes: int = 0
    accesses: int = 0
    widths: dict[int, int] = field(default_factory=dict)

    def add(self, count: int, width: int) -> None:
        self.nbytes += count * width
        self.accesses += count
        self.widths[width] = self.widths.get(width, 0) + count

    def merge(self, other: Traffic) -> None:
        self.nbytes += other.nbytes
        self.accesses += other.accesses
        for width, count in other.widths.items():
            self.widths[width] = self.widths.get(width, 0) + count


def space_of(instruction: Instruction) -> str | None:
    """The state space that is written in a memory instruction."""
    found = [SPACES[m] for m in instruction.modifiers if m in SPACES]
    return found[0] if len(found) == 1 else None


def place(
    frame: Frame, space: str, addresses: Array, lanes: Array, width: int
) -> Iterator[tuple[Region, Any, Offsets]]:
    """The regions that (lanes,) addresses touch: region, which of them, offsets.

    Raises:
        AccessError: misaligned or out of bounds.
    """
    if space == "global":
        yield from frame.memory.locate(addresses.astype(np.uint64), width)
    else:
        where = shared_offsets(frame, addresses, width)
        yield frame.shared, slice(None), where + frame.local[lanes] * frame.shared_stride


def shared_offsets(frame: Frame, addresses: Array, width: int) -> Offsets:
    """Shared addresses as offsets in their CTA's part.

    Raises:
        AccessError: misaligned or out of bounds.
    """
    where = addresses.astype(np.int64) - SHARED_BASE
    for wrong, reason in (
        ((where < 0) | (where + width > frame.shared_nbytes), Reason.OUT_OF_BOUNDS),
        (where % width != 0, Reason.MISALIGNED),
    ):
        if wrong.any():
            position = int(wrong.argmax())
            message = f"{width} bytes at byte {int(where[position])} of {frame.shared_nbytes} shared bytes"
            raise AccessError(reason, message, position)
    return where


def addresses_of(frame: Frame, instruction: Instruction, operand: Operand, space: str) -> Callable[[], Array]:
    """The addresses of all lanes, computed when called."""
    if not isinstance(operand, Address):
        raise instruction.error(Reason.SYNTAX, "an address wanted")
    base, offset = operand.base, operand.offset
    kind = "u64" if space == "global" else "u32"
    if isinstance(base, Register) and types.bits(frame.entry.registers[base.name]) == 64:
        kind = "u64"
    values = frame.source(instruction, base, kind)
    shift = np.int64(offset)
    if np.ndim(values) == 0:
        values = np.full(frame.lanes, values)
    return lambda: values.astype(np.int64) + shift


def check_modifiers(instruction: Instruction, allowed: set[str]) -> None:
    unknown = [m for m in instruction.modifiers if m not in allowed]
    if unknown:
        raise instruction.error(Reason.UNSUPPORTED, f".{unknown[0]} is not known here")


@dataclass(frozen=True, kw_only=True)
class _Shape:
    space: str
    kind: str
    items: int

    @property
    def part(self) -> int:
        return types.bits(self.kind) // 8

    @property
    def width(self) -> int:
        return self.part * self.items


_DATA = {f"{kind}{width}" for width in (8, 16, 32, 64) for kind in "bus"} | {"f32", "f64", "b128"}
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}


def _shape(instruction: Instruction) -> _Shape:
    """Space, type and vector length of a load or store."""
    allowed = SEMANTICS | SCOPES | _CACHE | set(SPACES) | _DATA | set(_VECTORS)
    check_modifiers(instruction, allowed)
    kinds = [m for m in instruction.modifiers if m in _DATA]
    space = space_of(instruction)
    if len(kinds) != 1 or instruction.modifiers[-1] != kinds[0] or space is None:
        raise instruction.error(Reason.UNSUPPORTED, "one state space and one type wanted")
    items = next((_VECTORS[m] for m in instruction.modifiers if m in _VECTORS), 1)
    return _Shape(space=space, kind=kinds[0], items=items)


def _items(instruction: Instruction, operand: Operand, shape: _Shape) -> tuple[Operand, ...]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != shape.items:
        raise instruction.error(Reason.SYNTAX, f"{shape.items} items wanted")
    return items


def expect_operands(instruction: Instruction, count: int) -> None:
    """Operand count; a cache policy may follow, and changes no result."""
    extra = "L2::cache_hint" in instruction.modifiers
    if len(instruction.operands) != count + extra:
        raise instruction.error(Reason.SYNTAX, f"{count + extra} operands wanted")


def _bind_parameter(frame: Frame, instruction: Instruction, shape: _Shape) -> Step:
    address = instruction.operands[1]
    base = address.base if isinstance(address, Address) else None
    known = {p.name: p for p in frame.entry.parameters}
    if not isinstance(base, Symbol) or base.name not in known or not isinstance(address, Address):
        raise instruction.error(Reason.UNSUPPORTED, "a parameter's name wanted")
    parameter, offset = known[base.name], address.offset
    if offset < 0 or offset + shape.width > parameter.nbytes:
        raise instruction.error(Reason.OUT_OF_BOUNDS, f"{base.name} has {parameter.nbytes} bytes")
    if (parameter.offset + offset) % shape.width:
        raise instruction.error(Reason.MISALIGNED, f"{shape.width} bytes at byte {offset} of {base.name}")
    raw = frame.parameters[parameter.offset + offset :][: shape.width]
    values = np.frombuffer(raw, types.dtype(shape.kind)).reshape(shape.items, -1)
    targets = [
        (frame.writer(instruction, item, shape.kind, wide=True), value)
        for item, value in zip(_items(instruction, instruction.operands[0], shape), values, strict=True)
    ]

    def step(mask: Bools | None) -> None:
        for target, value in targets:
            put(target, value, mask)

    return step


def _bind_load(frame: Frame, instruction: Instruction, traffic: Traffic) -> Step:
    shape = _shape(instruction)
    expect_operands(instruction, 2)
    if shape.space == "param":
        return _bind_parameter(frame, instruction, shape)
    items = _items(instruction, instruction.operands[0], shape)
    targets = [
        None if isinstance(item, Sink) else frame.writer(instruction, item, shape.kind, wide=True)
        for item in items
    ]
    addresses = addresses_of(frame, instruction, instruction.operands[1], shape.space)
    everyone = np.arange(frame.lanes)
    kind = types.dtype(shape.kind)

    def step(mask: Bools | None) -> None:
        lanes = everyone if mask is None else np.flatnonzero(mask)
        where, stamps = addresses()[lanes], frame.stamps[lanes]
        rows = np.empty((len(lanes), shape.width), np.uint8)
        try:
            for region, some, offsets in place(frame, shape.space, where, lanes, shape.width):
                rows[some] = region.load(offsets, shape.width, stamps[some])
        except AccessError as fault:
            raise frame.located(instruction, fault, lanes) from fault
        traffic.add(len(where), shape.width)
        values = rows.view(kind).reshape(len(lanes), shape.items, -1)
        for i, target in enumerate(targets):
            if target is not None:
                target[lanes] = values[:, i] if target.ndim == 2 else values[:, i, 0]

    return step


def _bind_store(frame: Frame, instruction: Instruction, traffic: Traffic) -> Step:
    shape = _shape(instruction)
    expect_operands(instruction, 2)
    if shape.space == "param":
        raise instruction.error(Reason.UNSUPPORTED, "parameters cannot be written")
    addresses = addresses_of(frame, instruction, instruction.operands[0], shape.space)
    sources = [
        np.broadcast_to(np.atleast_1d(frame.source(instruction, item, shape.kind, wide=True)), (frame.lanes,))
        if shape.kind != "b128"
        else frame.source(instruction, item, shape.kind)
        for item in _items(instruction, instruction.operands[1], shape)
    ]
    everyone = np.arange(frame.lanes)
    kind = types.dtype(shape.kind)

    def step(mask: Bools | None) -> None:
        lanes = everyone if mask is None else np.flatnonzero(mask)
        where, stamps = addresses()[lanes], frame.stamps[lanes]
        values = np.empty((len(lanes), shape.items, shape.part // kind.itemsize), kind)
        for i, source in enumerate(sources):
            values[:, i] = source[lanes].reshape(len(lanes), -1)
        rows = values.reshape(len(lanes), -1).view(np.uint8)
        try:
            for region, some, offsets in place(frame, shape.space, where, lanes, shape.width):
                region.store(offsets, rows[some], stamps[some])
        except AccessError as fault:
            raise frame.located(instruction, fault, lanes) from fault
        traffic.add(len(where), shape.width)

    return step


def bind(frame: Frame, instruction: Instruction, traffic: dict[str, Traffic]) -> Step | None:
    """The step of a load, store or fence, None when it is none; ``traffic``: counters by ``ld.global`` and so on."""
    binder = {"ld": _bind_load, "st": _bind_store}.get(instruction.opcode)
    if binder is not None and "async" not in instruction.modifiers:
        key = f"{instruction.opcode}.{space_of(instruction)}"
        return binder(frame, instruction, traffic.setdefault(key, Traffic()))
    if instruction.opcode in ("membar", "fence"):
        check_modifiers(instruction, SEMANTICS | SCOPES | {"gl", "sc"})
        return lambda mask: None
    return None
