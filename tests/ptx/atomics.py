"""atom and red: integers alone, each place changed by one lane after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.ptx import types
from tests.ptx.access import (
    SCOPES,
    SEMANTICS,
    SPACES,
    Traffic,
    addresses_of,
    check_modifiers,
    expect_operands,
    place,
    space_of,
)
from tests.ptx.errors import AccessError, Reason
from tests.ptx.frame import Frame, Step
from tests.ptx.operands import Sink
from tests.ptx.parse import Instruction
from tests.ptx.types import Bools

__all__ = ["bind"]

_ATOMICS: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
}
_ATOMIC_TYPES = {f"{kind}{width}" for kind in "bus" for width in (32, 64)}


def _atomic_kind(instruction: Instruction) -> tuple[str, str, str]:
    """Space, operation and type."""
    check_modifiers(instruction, SEMANTICS | SCOPES | set(SPACES) | set(_ATOMICS) | {"cas"} | _ATOMIC_TYPES)
    names = [m for m in instruction.modifiers if m in _ATOMICS or m == "cas"]
    kinds = [m for m in instruction.modifiers if m in _ATOMIC_TYPES]
    space = space_of(instruction) or "global"
    if len(names) != 1 or len(kinds) != 1 or space == "param" or instruction.modifiers[-1] != kinds[0]:
        raise instruction.error(Reason.UNSUPPORTED, "one operation and one integer type wanted")
    return space, names[0], kinds[0]


def _turns(at: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """Lanes in groups in which no place comes twice; the order of lanes is kept at every place."""
    order = np.argsort(at, kind="stable")
    ordered = at[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    starts = np.maximum.accumulate(np.where(first, np.arange(len(at)), 0))
    turn = np.arange(len(at)) - starts
    for number in range(int(turn.max(initial=-1)) + 1):
        yield order[turn == number]


def _bind_atomic(frame: Frame, instruction: Instruction, traffic: Traffic) -> Step:
    space, name, kind = _atomic_kind(instruction)
    returns = instruction.opcode == "atom"
    expect_operands(instruction, 2 + returns + (name == "cas"))
    target = None
    if returns and not isinstance(instruction.operands[0], Sink):
        target = frame.writer(instruction, instruction.operands[0], kind)
    where_, *rest = instruction.operands[returns:]
    addresses = addresses_of(frame, instruction, where_, space)
    sources = [
        np.broadcast_to(np.atleast_1d(frame.source(instruction, item, kind)), (frame.lanes,)) for item in rest
    ]
    width, everyone = types.bits(kind) // 8, np.arange(frame.lanes)

    def step(mask: Bools | None) -> None:
        lanes = everyone if mask is None else np.flatnonzero(mask)
        where, stamps = addresses()[lanes], frame.stamps[lanes]
        values = [source[lanes] for source in sources]
        old = np.empty(len(lanes), types.dtype(kind))
        try:
            for region, some, offsets in place(frame, space, where, lanes, width):
                words = region.atomic(offsets, width, stamps[some]).view(types.dtype(kind))
                at, chosen = offsets // width, np.arange(len(lanes))[some]
                for turn in _turns(at):
                    now, mine = words[at[turn]], chosen[turn]
                    old[mine] = now
                    if name == "cas":
                        words[at[turn]] = np.where(now == values[0][mine], values[1][mine], now)
                    else:
                        words[at[turn]] = _ATOMICS[name](now, values[0][mine])
        except AccessError as fault:
            raise frame.located(instruction, fault, lanes) from fault
        traffic.add(len(where), width)
        if target is not None:
            target[lanes] = old

    return step


def bind(frame: Frame, instruction: Instruction, traffic: dict[str, Traffic]) -> Step | None:
    """The step of an atomic, None when it is none; ``red`` counts with ``atom``."""
    if instruction.opcode not in ("atom", "red") or "async" in instruction.modifiers:
        return None
    key = f"atom.{space_of(instruction) or 'global'}"
    return _bind_atomic(frame, instruction, traffic.setdefault(key, Traffic()))
