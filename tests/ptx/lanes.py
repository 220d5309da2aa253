"""Instructions between the lanes of a warp: shfl, vote, match, redux, elect, bar.warp, ldmatrix, stmatrix.

The scheduler has seen to it that all lanes which a member mask names are here. Source: PTX ISA, "Parallel
Synchronization and Communication Instructions" and "Warp Level Matrix Instructions".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx import floats, types
from tests.ptx.access import Traffic, addresses_of, place, shared_offsets
from tests.ptx.errors import AccessError, Reason
from tests.ptx.frame import WARP, Frame, Step, put
from tests.ptx.operands import Operand, Pair, Sink, Vector
from tests.ptx.parse import Instruction
from tests.ptx.types import Array, Bools

__all__ = ["bind", "is_collective", "members_operand"]

_SHUFFLE = re.compile(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
_VOTE = re.compile(r"vote\.sync\.(?:(all|any|uni)\.pred|(ballot)\.b32)")
_MATCH = re.compile(r"match\.(any|all)\.sync\.(b32|b64)")
_REDUCE = re.compile(
    r"redux\.sync\.(?:(add|min|max)\.([us]32)|(and|or|xor)\.(b32)|(min|max)(\.abs)?(\.NaN)?\.(f32))"
)
_MATRIX = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
_COLLECTIVES = ("shfl", "vote", "match", "redux", "elect", "ldmatrix", "stmatrix")
FULL = np.uint32(0xFFFFFFFF)


def is_collective(instruction: Instruction) -> bool:
    """Whether lanes must meet at this instruction."""
    return instruction.opcode in _COLLECTIVES or instruction.mnemonic in (
        "bar.warp.sync",
        "barrier.warp.sync",
    )


def members_operand(frame: Frame, instruction: Instruction) -> Callable[[], Any]:
    """Reads the lanes that must meet, one bit each; matrices take the whole warp."""
    if "matrix" in instruction.opcode:
        return lambda: FULL
    return frame.reader(instruction, instruction.operands[-1], "b32")


def _expect(instruction: Instruction, count: int) -> None:
    if len(instruction.operands) != count:
        raise instruction.error(Reason.SYNTAX, f"{count} operands wanted")


def _targets(frame: Frame, instruction: Instruction, kinds: tuple[str, str]) -> list[Any]:
    """The first operand's one or two destinations, None where the result is not wanted."""
    first: Operand = instruction.operands[0]
    pair = first if isinstance(first, Pair) else Pair(first, Sink())
    return [
        None if isinstance(item, Sink) else frame.writer(instruction, item, kind)
        for item, kind in zip((pair.first, pair.second), kinds, strict=True)
    ]


def _full(frame: Frame, values: Any) -> Array:
    """(warps, 32), constants spread."""
    return np.ascontiguousarray(np.broadcast_to(values, (frame.lanes,))).reshape(-1, WARP)


def _together(members: Array, mask: Bools | None) -> Bools:
    """(warps, 32, 32): whether lane i takes part in what lane j computes."""
    bits = (members[:, :, None] >> np.arange(WARP, dtype=np.uint32) & np.uint32(1)).astype(np.bool_)
    return bits if mask is None else bits & mask.reshape(-1, 1, WARP)


def _whole(members: Any, mask: Bools | None) -> bool:
    return mask is None and np.ndim(members) == 0 and np.uint32(members) == FULL


def _bind_shuffle(frame: Frame, instruction: Instruction) -> Step:
    match = _SHUFFLE.fullmatch(instruction.mnemonic)
    if not match:
        raise instruction.error(Reason.UNSUPPORTED, f"{instruction.mnemonic} is not known")
    _expect(instruction, 5)
    target, found = _targets(frame, instruction, ("b32", "pred"))
    values, by, limit = (frame.reader(instruction, o, "b32") for o in instruction.operands[1:4])
    members = members_operand(frame, instruction)
    lane, mode = frame.lane, match[1]
    base = np.arange(frame.lanes) - lane

    def step(mask: Bools | None) -> None:
        b, c = np.asarray(by(), np.int64) & 31, np.asarray(limit(), np.int64)
        clamp, segment = c & 31, c >> 8 & 31
        low = lane & segment
        high = low | (clamp & ~segment)
        goal = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~segment)}[mode]
        inside = goal >= high if mode == "up" else goal <= high
        source = base + np.where(inside, goal, lane)
        if not _whole(members(), mask):
            here = np.ones(frame.lanes, np.bool_) if mask is None else mask
            named = np.broadcast_to(members(), (frame.lanes,)) >> (source - base).astype(np.uint32) & 1
            wrong = here & ~(here[source] & (named != 0))
            if wrong.any():
                raise frame.error(
                    instruction, Reason.UNDEFINED, "a lane that takes no part is read", int(wrong.argmax())
                )
        taken = np.broadcast_to(values(), (frame.lanes,))[source]
        if target is not None:
            put(target, taken, mask)
        if found is not None:
            put(found, inside, mask)

    return step


def _bind_vote(frame: Frame, instruction: Instruction) -> Step:
    match = _VOTE.fullmatch(instruction.mnemonic)
    if not match:
        raise instruction.error(Reason.UNSUPPORTED, f"{instruction.mnemonic} is not known")
    _expect(instruction, 3)
    kind = "b32" if match[2] else "pred"
    (target, _), mode = _targets(frame, instruction, (kind, kind)), match[1] or match[2]
    values = frame.reader(instruction, instruction.operands[1], "pred")
    members = members_operand(frame, instruction)

    def step(mask: Bools | None) -> None:
        votes = _full(frame, values())
        if not _whole(members(), mask):
            taking = _together(_full(frame, members()), mask)
            yes = taking & votes[:, None, :]
            ballot = np.packbits(yes, axis=-1, bitorder="little").view(np.uint32)[..., 0]
            every = np.packbits(taking, axis=-1, bitorder="little").view(np.uint32)[..., 0]
        else:
            ballot = np.packbits(votes, axis=-1, bitorder="little").view(np.uint32)
            every = FULL
        result = {
            "ballot": lambda: ballot,
            "all": lambda: ballot == every,
            "any": lambda: ballot != 0,
            "uni": lambda: (ballot == every) | (ballot == 0),
        }[mode]()
        if target is not None:
            put(target, np.broadcast_to(result, (len(votes), WARP)).reshape(-1), mask)

    return step


def _bind_match(frame: Frame, instruction: Instruction) -> Step:
    match = _MATCH.fullmatch(instruction.mnemonic)
    if not match:
        raise instruction.error(Reason.UNSUPPORTED, f"{instruction.mnemonic} is not known")
    _expect(instruction, 3)
    target, agree = _targets(frame, instruction, ("b32", "pred"))
    values = frame.reader(instruction, instruction.operands[1], match[2])
    members = members_operand(frame, instruction)

    def step(mask: Bools | None) -> None:
        rows = _full(frame, values())
        taking = _together(_full(frame, members()), mask)
        equal = taking & (rows[:, :, None] == rows[:, None, :])
        same, every = (
            np.packbits(x, axis=-1, bitorder="little").view(np.uint32)[..., 0] for x in (equal, taking)
        )
        result = same if match[1] == "any" else np.where(same == every, same, 0)
        if target is not None:
            put(target, result.reshape(-1), mask)
        if agree is not None:
            put(agree, (same == every).reshape(-1), mask)

    return step


_REDUCTIONS: dict[str, Any] = {
    "add": (np.add, 0),
    "min": (np.minimum, "max"),
    "max": (np.maximum, "min"),
    "and": (np.bitwise_and, -1),
    "or": (np.bitwise_or, 0),
    "xor": (np.bitwise_xor, 0),
}


def _reduce_floats(name: str, absolute: bool, spread: bool) -> Callable[[Array], Array]:
    operations = dict(floats.operations())
    combine = operations[f"{name}{'.NaN' if spread else ''}.f32"].function

    def reduce(rows: Array) -> Array:
        rows = np.abs(rows) if absolute else rows
        total = rows[..., 0]
        for i in range(1, rows.shape[-1]):
            total = combine(total, rows[..., i])
        return total

    return reduce


def _bind_reduce(frame: Frame, instruction: Instruction) -> Step:
    match = _REDUCE.fullmatch(instruction.mnemonic)
    if not match:
        raise instruction.error(Reason.UNSUPPORTED, f"{instruction.mnemonic} is not known")
    _expect(instruction, 3)
    name, kind = match[1] or match[3] or match[5], match[2] or match[4] or match[8]
    (target, _) = _targets(frame, instruction, (kind, kind))
    values = frame.reader(instruction, instruction.operands[1], kind)
    members = members_operand(frame, instruction)
    if kind == "f32":
        reduce, neutral = _reduce_floats(name, bool(match[6]), bool(match[7])), None
    else:
        ufunc, start = _REDUCTIONS[name]
        limits = np.iinfo(types.dtype(kind))
        neutral = np.array(getattr(limits, start) if isinstance(start, str) else start).astype(
            types.dtype(kind)
        )
        reduce = lambda rows: ufunc.reduce(rows, axis=-1, dtype=rows.dtype)  # noqa: E731

    def step(mask: Bools | None) -> None:
        rows = _full(frame, values())
        if _whole(members(), mask):
            result = np.repeat(reduce(rows), WARP)
        else:
            taking = _together(_full(frame, members()), mask)
            fill = (
                rows[:, :, None] if neutral is None else neutral
            )  # own value again: no float changes by that
            result = reduce(np.where(taking, rows[:, None, :], fill)).reshape(-1)
        if target is not None:
            put(target, result, mask)

    return step


def _bind_elect(frame: Frame, instruction: Instruction) -> Step:
    if instruction.mnemonic != "elect.sync":
        raise instruction.error(Reason.UNSUPPORTED, f"{instruction.mnemonic} is not known")
    _expect(instruction, 2)
    leader, chosen = _targets(frame, instruction, ("b32", "pred"))
    members = members_operand(frame, instruction)

    def step(mask: Bools | None) -> None:
        first = _together(_full(frame, members()), mask).argmax(axis=-1).reshape(-1)
        if leader is not None:
            put(leader, first, mask)
        if chosen is not None:
            put(chosen, first == frame.lane, mask)

    return step


def _bind_warp_barrier(frame: Frame, instruction: Instruction) -> Step:
    _expect(instruction, 1)
    members = members_operand(frame, instruction)

    def step(mask: Bools | None) -> None:
        """Only a whole warp's barrier orders memory here; some lanes' alone is taken for none."""
        here = np.ones(frame.lanes, np.bool_) if mask is None else mask
        whole = (here & np.broadcast_to(members() == FULL, (frame.lanes,))).reshape(-1, WARP).all(axis=1)
        frame.warp_epochs[whole] += 1
        frame.tick()

    return step


def _bind_matrix(frame: Frame, instruction: Instruction, traffic: dict[str, Traffic]) -> Step:
    """Each lane's part of a row is an access like any other: 4 bytes of a row, or 2 and 2 transposed."""
    match = _MATRIX.fullmatch(instruction.mnemonic)
    if not match:
        raise instruction.error(Reason.UNSUPPORTED, f"{instruction.mnemonic} is not known")
    _expect(instruction, 2)
    load, count, transposed = match[1] == "ld", int(match[2]), bool(match[3])
    address, vector = instruction.operands if not load else instruction.operands[::-1]
    if not isinstance(vector, Vector):
        vector = Vector((vector,))
    if len(vector.items) != count:
        raise instruction.error(Reason.SYNTAX, f"{count} registers wanted")
    registers = [
        frame.writer(instruction, o, "b32") if load else frame.source(instruction, o, "b32")
        for o in vector.items
    ]
    rows_at = addresses_of(frame, instruction, address, "shared")
    counter = traffic.setdefault("ld.shared" if load else "st.shared", Traffic())
    lane, base = frame.lane, np.arange(frame.lanes) - frame.lane
    parts = [(lane // 4, lane % 4 * 4, 4)]
    if transposed:
        parts = [(lane % 4 * 2 + half, lane // 4 * 2, 2) for half in (0, 1)]

    def step(mask: Bools | None) -> None:
        lanes = np.arange(frame.lanes) if mask is None else np.flatnonzero(mask)
        rows, stamps = rows_at(), frame.stamps[lanes]
        starts = lanes[frame.lane[lanes] < 8 * count]
        try:
            shared_offsets(frame, rows[starts], 16)
        except AccessError as fault:
            raise frame.located(instruction, fault, starts) from fault
        for i, register in enumerate(registers):
            words = (
                np.empty((len(lanes), 4), np.uint8) if load else register[lanes].view(np.uint8).reshape(-1, 4)
            )
            for part, (row, column, width) in enumerate(parts):
                where = (rows[base + 8 * i + row] + column)[lanes]
                span = slice(part * width, (part + 1) * width)
                try:
                    for region, some, offsets in place(frame, "shared", where, lanes, width):
                        if load:
                            words[some, span] = region.load(offsets, width, stamps[some])
                        else:
                            region.store(offsets, words[some, span], stamps[some])
                except AccessError as fault:
                    raise frame.located(instruction, fault, lanes) from fault
                counter.add(where, frame.warp[lanes], width)
            if load:
                register[lanes] = words.view(np.uint32)[:, 0]

    return step


def bind(frame: Frame, instruction: Instruction, traffic: dict[str, Traffic]) -> Step | None:
    """The step of a collective instruction, None when it is none."""
    if not is_collective(instruction):
        return None
    if "matrix" in instruction.opcode:
        return _bind_matrix(frame, instruction, traffic)
    binders = {
        "shfl": _bind_shuffle,
        "vote": _bind_vote,
        "match": _bind_match,
        "redux": _bind_reduce,
        "elect": _bind_elect,
    }
    return binders.get(instruction.opcode, _bind_warp_barrier)(frame, instruction)
