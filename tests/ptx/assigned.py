"""Reads of registers that nobody wrote."""

from __future__ import annotations

import numpy as np

from tests.ptx.errors import Reason
from tests.ptx.flow import Program, destinations
from tests.ptx.frame import Frame, Step
from tests.ptx.parse import Instruction
from tests.ptx.types import Bools

__all__ = ["Assigned"]


class Assigned:
    """Which lanes have written the registers that an analysis could not clear."""

    def __init__(self, program: Program, frame: Frame) -> None:
        names = {name for found in program.doubtful.values() for name in found}
        self._frame, self._written = frame, {name: np.zeros(frame.lanes, np.bool_) for name in names}

    def wrap(self, instruction: Instruction, step: Step, doubtful: tuple[str, ...]) -> Step:
        """``step`` with a look at what it reads, and a note of what it writes."""
        read = [(name, self._written[name]) for name in doubtful if name != instruction.guard]
        noted = [self._written[name] for name in destinations(instruction) if name in self._written]
        if not read and not noted:
            return step

        def checked(mask: Bools | None) -> None:
            for name, written in read:
                self._refuse(instruction, name, written, mask)
            step(mask)
            for written in noted:
                written[...] = True if mask is None else written | mask

        return checked

    def guard(self, instruction: Instruction, mask: Bools | None) -> None:
        """Refuse a guard that nobody wrote."""
        if instruction.guard in self._written:
            self._refuse(instruction, instruction.guard, self._written[instruction.guard], mask)

    def _refuse(self, instruction: Instruction, name: str, written: Bools, mask: Bools | None) -> None:
        missing = ~written if mask is None else mask & ~written
        if missing.any():
            raise self._frame.error(
                instruction, Reason.UNINITIALISED, f"register {name}", int(missing.argmax())
            )
