"""Binding of instructions that touch neither memory nor other lanes: registers in, registers out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from tests.ptx import convert, floats, integers, types
from tests.ptx.errors import Reason
from tests.ptx.frame import Frame, Step, Writer, active, put
from tests.ptx.operands import Operand, Pair, Register, Sink, Vector
from tests.ptx.operation import Operation
from tests.ptx.parse import Instruction
from tests.ptx.types import Bools

__all__ = ["bind", "table"]

_MOVES = (
    "pred",
    *(f"{kind}{width}" for width in (16, 32, 64) for kind in "busf" if kind + str(width) != "f16"),
    "b128",
)


@functools.cache
def table() -> Mapping[str, Operation]:
    """Every spelling that has a meaning here."""
    every = itertools.chain(integers.operations(), floats.operations(), convert.operations())
    return MappingProxyType(dict(every))


def _ufunc(function: np.ufunc, target: Writer, sources: list[Any]) -> Step:
    def step(mask: Bools | None) -> None:
        if mask is None:
            function(*sources, out=target, casting="unsafe")
        else:
            np.copyto(target, function(*sources), where=mask, casting="unsafe")

    return step


def _bind_operation(frame: Frame, instruction: Instruction, operation: Operation) -> Step:
    first, *rest = instruction.operands or (Sink(),)
    if len(rest) != len(operation.sources):
        raise instruction.error(
            Reason.SYNTAX, f"{len(operation.sources)} sources wanted, there are {len(rest)}"
        )
    pair = first if isinstance(first, Pair) else Pair(first, Sink())
    if isinstance(first, Pair) and operation.second is None:
        raise instruction.error(Reason.SYNTAX, "one destination wanted")
    wide, sources = operation.wide, list(zip(rest, operation.sources, strict=True))
    readers = [frame.reader(instruction, operand, kind, wide=wide) for operand, kind in sources]
    functions = ((pair.first, operation.function), (pair.second, operation.second))
    targets = [
        (frame.writer(instruction, where, operation.result, wide=wide), function)
        for where, function in functions
        if not isinstance(where, Sink) and function is not None
    ]
    negated = any(isinstance(operand, Register) and operand.negated for operand in rest)
    if len(targets) == 1 and isinstance(targets[0][1], np.ufunc) and not negated and targets[0][0].ndim == 1:
        return _ufunc(targets[0][1], targets[0][0], [read() for read in readers])

    def step(mask: Bools | None) -> None:
        values = [read() for read in readers]
        if operation.undefined is not None:
            bad = operation.undefined(*values) & (True if mask is None else mask)
            if np.any(bad):
                lane = int(np.broadcast_to(bad, frame.lanes).argmax())
                raise frame.error(instruction, Reason.UNDEFINED, f"{instruction.opcode} by zero", lane)
        results = [(target, function(*values)) for target, function in targets]
        for target, result in results:
            put(target, result, mask)

    return step


def _halves(instruction: Instruction, vector: Vector, kind: str) -> str:
    """The type of a vector's items, which together are ``kind``."""
    width = types.bits(kind) // len(vector.items)
    if width * len(vector.items) != types.bits(kind) or width not in (8, 16, 32, 64):
        raise instruction.error(Reason.SYNTAX, f"{len(vector.items)} items do not make .{kind}")
    return f"b{width}"


def _bind_unpack(frame: Frame, instruction: Instruction, target: Vector, source: Operand, kind: str) -> Step:
    part = _halves(instruction, target, kind)
    if not isinstance(source, Register):
        raise instruction.error(Reason.SYNTAX, "a register wanted")
    whole = frame.source(instruction, source, f"b{types.bits(kind)}")
    parts = whole.view(types.dtype(part)).reshape(frame.lanes, -1)
    targets = [
        (frame.writer(instruction, item, part), parts[:, i])
        for i, item in enumerate(target.items)
        if not isinstance(item, Sink)
    ]

    def step(mask: Bools | None) -> None:
        for register, values in [(register, values.copy()) for register, values in targets]:
            put(register, values, mask)

    return step


def _bind_pack(frame: Frame, instruction: Instruction, target: Operand, source: Vector, kind: str) -> Step:
    part = _halves(instruction, source, kind)
    whole = frame.writer(instruction, target, f"b{types.bits(kind)}")
    parts = whole.view(types.dtype(part)).reshape(frame.lanes, -1)
    sources = [frame.source(instruction, item, part) for item in source.items]
    own = isinstance(target, Register) and target in source.items

    def step(mask: Bools | None) -> None:
        values = [np.copy(value) for value in sources] if own else sources
        for i, value in enumerate(values):
            put(parts[:, i], value, mask)

    return step


def _bind_move(frame: Frame, instruction: Instruction) -> Step:
    kind = instruction.modifiers[0] if len(instruction.modifiers) == 1 else ""
    if kind not in _MOVES or len(instruction.operands) != 2:
        raise instruction.error(Reason.UNSUPPORTED, f"{instruction.mnemonic} is not known")
    target, source = instruction.operands
    if isinstance(target, Vector):
        return _bind_unpack(frame, instruction, target, source, kind)
    if isinstance(source, Vector):
        return _bind_pack(frame, instruction, target, source, kind)
    register = frame.writer(instruction, target, kind)
    read = frame.reader(instruction, source, kind)

    def step(mask: Bools | None) -> None:
        put(register, read(), mask)

    return step


def _bind_address_space(frame: Frame, instruction: Instruction) -> Step:
    """Generic addresses are global ones here, and nothing else has a generic address."""
    target, source = instruction.operands
    register = frame.writer(instruction, target, "b64")
    values = frame.source(instruction, source, "b64")
    return lambda mask: put(register, values, mask)


def _bind_active_mask(frame: Frame, instruction: Instruction) -> Step:
    register = frame.writer(instruction, instruction.operands[0], "b32")

    def step(mask: Bools | None) -> None:
        lanes = active(mask, frame.lanes)
        words = np.zeros(frame.lanes // 32, np.uint32)
        np.bitwise_or.at(words, frame.warp[lanes], np.uint32(1) << frame.lane[lanes].astype(np.uint32))
        put(register, words[frame.warp], mask)

    return step


def bind(frame: Frame, instruction: Instruction) -> Step | None:
    """The step of an instruction of this kind, None when it is of another."""
    operation = table().get(instruction.mnemonic)
    if operation is not None:
        return _bind_operation(frame, instruction, operation)
    if instruction.opcode == "mov":
        return _bind_move(frame, instruction)
    if instruction.mnemonic in ("cvta.to.global.u64", "cvta.global.u64"):
        return _bind_address_space(frame, instruction)
    if instruction.mnemonic == "activemask.b32":
        return _bind_active_mask(frame, instruction)
    return None
