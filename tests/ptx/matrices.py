"""ldmatrix and stmatrix: each lane's part of a row is an access like any other, 4 bytes, or 2 and 2 transposed.

Source: PTX ISA, "Warp Level Matrix Instructions".
"""

from __future__ import annotations

import re

import numpy as np

from tests.ptx.access import Traffic, addresses_of, expect_operands, place, shared_offsets
from tests.ptx.errors import AccessError, Reason
from tests.ptx.frame import Frame, Step
from tests.ptx.operands import Vector
from tests.ptx.parse import Instruction
from tests.ptx.types import Bools

__all__ = ["bind"]

_MATRIX = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")


def bind(frame: Frame, instruction: Instruction, traffic: dict[str, Traffic]) -> Step:
    """The step of a matrix instruction."""
    match = _MATRIX.fullmatch(instruction.mnemonic)
    if not match:
        raise instruction.error(Reason.UNSUPPORTED, f"{instruction.mnemonic} is not known")
    expect_operands(instruction, 2)
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
                counter.add(len(where), width)
            if load:
                register[lanes] = words.view(np.uint32)[:, 0]

    return step
