"""Which lanes run what next: divergence, reconvergence, barriers, and what may go wrong with them.

Of all lanes that can run, those at the lowest block run, together. Where lanes diverge, those behind catch up, so they
meet again at the first place that both reach. A barrier's lanes wait until nobody else can run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx import access, atomics, compute, lanes
from tests.ptx.access import Traffic
from tests.ptx.assigned import Assigned
from tests.ptx.errors import PtxError, Reason
from tests.ptx.flow import Block, Program, ending_of
from tests.ptx.frame import WARP, Frame, Step
from tests.ptx.operands import Immediate
from tests.ptx.parse import Instruction
from tests.ptx.types import Array, Bools

__all__ = ["Scheduler"]

_WAITING = 1 << 20  # added to the block number of a lane that waits
_EXITED = 1 << 21


def _nothing(mask: Bools | None) -> None:
    """An instruction that orders, and changes nothing."""


def _bind(frame: Frame, instruction: Instruction, traffic: dict[str, Traffic]) -> Step:
    if instruction.mnemonic == "trap":

        def trap(mask: Bools | None) -> None:
            raise frame.error(instruction, Reason.TRAP, "reached", 0 if mask is None else int(mask.argmax()))

        return trap
    if instruction.mnemonic == "nop":
        return _nothing
    for step in (
        lanes.bind(frame, instruction, traffic),
        access.bind(frame, instruction, traffic),
        atomics.bind(frame, instruction, traffic),
        compute.bind(frame, instruction),
    ):
        if step is not None:
            return step
    raise instruction.error(Reason.UNSUPPORTED, f"{instruction.mnemonic} is not known")


class Scheduler:
    """Runs a frame to its end."""

    def __init__(self, program: Program, frame: Frame, traffic: dict[str, Traffic], limit: int) -> None:
        self.program, self.frame, self.limit = program, frame, limit
        self.executed = [0] * len(program.blocks)  # lanes that ran each block, in all
        self.barriers = 0
        self._assigned = Assigned(program, frame)
        self._traffic = traffic
        self._steps: list[list[Step] | None] = [None] * len(program.blocks)
        code = program.entry.instructions
        self._members: dict[int, Callable[[], Any]] = {
            i: lanes.members_operand(frame, code[block.first])
            for i, block in enumerate(program.blocks)
            if block.collective
        }
        self._at = np.zeros(frame.lanes, np.int32)
        self._count = 0

    def bind(self, number: int) -> list[Step]:
        """The steps of a block, made when it is first reached.

        Raises:
            PtxError: an instruction that is not known, or with operands that do not fit it.
        """
        steps = self._steps[number]
        if steps is None:
            block = self.program.blocks[number]
            steps = [self._step_of(i) for i in range(block.first, block.last)]
            self._steps[number] = steps
        return steps

    def _step_of(self, i: int) -> Step:
        instruction = self.program.entry.instructions[i]
        if ending_of(instruction) != "fall":
            return _nothing
        step = _bind(self.frame, instruction, self._traffic)
        return self._assigned.wrap(instruction, step, self.program.doubtful.get(i, ()))

    def run(self) -> None:
        """Until every lane has exited.

        Raises:
            PtxError: any finding.
        """
        number, mask = 0, None
        while True:
            if mask is None and number in self._members and np.ndim(self._members[number]()):
                self._refuse_absent(number)
            after = self._run_block(number, mask)
            if after is not None:
                number = after
                continue
            choice = self._choose()
            if choice is None:
                return
            number, mask = choice

    def _run_block(self, number: int, mask: Bools | None) -> int | None:
        """Returns the next block when all lanes go there together, else None."""
        block, count = (
            self.program.blocks[number],
            self.frame.lanes if mask is None else int(np.count_nonzero(mask)),
        )
        self._count += block.last - block.first
        if self._count > self.limit:
            lane = 0 if mask is None else int(mask.argmax())
            raise self._error(block.last - 1, Reason.LIMIT, f"more than {self.limit} in a row", lane)
        self.executed[number] += count
        code = self.program.entry.instructions
        body = block.last - (block.ending != "fall")
        for instruction, step in zip(code[block.first : body], self.bind(number), strict=False):
            if instruction.guard is None:
                step(mask)
            else:
                some = self._guarded(instruction, mask)
                hits = int(np.count_nonzero(some))
                if hits:
                    step(None if hits == self.frame.lanes else some)
        return self._leave(block, number, mask)

    def _guarded(self, instruction: Instruction, mask: Bools | None) -> Bools:
        assert instruction.guard is not None
        self._assigned.guard(instruction, mask)
        guard = self.frame.registers[instruction.guard]
        some: Bools = ~guard if instruction.negated else guard.copy()
        if mask is not None:
            some &= mask
        return some

    def _leave(self, block: Block, number: int, mask: Bools | None) -> int | None:
        instruction = self.program.entry.instructions[block.last - 1]
        if block.ending == "fall":
            return self._go(mask, None, number + 1, number + 1)
        taken = mask if instruction.guard is None else self._guarded(instruction, mask)
        if block.ending == "branch":
            return self._go(mask, taken, block.targets[0], number + 1)
        if block.ending == "index":
            return self._jump(block, mask, taken, number + 1)
        if block.ending == "exit":
            return self._go(mask, taken, _EXITED, number + 1)
        return self._barrier(instruction, number, mask, taken)

    def _go(self, mask: Bools | None, taken: Bools | None, target: int, other: int) -> int | None:
        """Lanes of ``taken`` (None: all of mask) go to ``target``, the rest of ``mask`` to ``other``."""
        if mask is None and (taken is None or taken.all()) and target < _WAITING:
            return target
        if mask is None and taken is not None and not taken.any() and other < _WAITING:
            return other
        if mask is None:
            self._at[:] = other
        else:
            self._at[mask] = other
        self._at[slice(None) if taken is None and mask is None else mask if taken is None else taken] = target
        return None

    def _jump(self, block: Block, mask: Bools | None, taken: Bools | None, other: int) -> int | None:
        """Lanes of ``taken`` (None: all) go where their index says, the rest of ``mask`` to ``other``."""
        instruction = self.program.entry.instructions[block.last - 1]
        index = np.broadcast_to(
            self.frame.source(instruction, instruction.operands[0], "u32"), (self.frame.lanes,)
        )
        lanes = np.ones(self.frame.lanes, np.bool_) if taken is None else taken
        beyond = lanes & (index >= len(block.targets))
        if beyond.any():
            message = f"an index of more than the {len(block.targets)} targets"
            raise self._error(block.last - 1, Reason.UNDEFINED, message, int(beyond.argmax()))
        if mask is None:
            self._at[:] = other
        else:
            self._at[mask] = other
        self._at[lanes] = np.array(block.targets, np.int32)[index[lanes]]
        return None

    def _barrier(
        self, instruction: Instruction, number: int, mask: Bools | None, taken: Bools | None
    ) -> int | None:
        operands = instruction.operands
        threads = self.frame.geometry.threads
        known = bool(operands) and operands[0] == Immediate(0) and operands[1:] in ((), (Immediate(threads),))
        if not known:
            raise instruction.error(Reason.UNSUPPORTED, "barrier 0 of all threads wanted")
        if mask is None and taken is None:  # all are here: nobody has to wait
            self._pass(slice(None))
            return number + 1
        return self._go(mask, taken, number + _WAITING, number + 1)

    def _pass(self, ctas: Any) -> None:
        self.frame.epochs[ctas] += 1
        self.frame.warp_epochs.reshape(self.frame.count, -1)[ctas] = 0
        self.frame.tick()
        self.barriers += len(self.frame.epochs[ctas])

    def _choose(self) -> tuple[int, Bools | None] | None:
        """The next block and its lanes; None when all have exited."""
        while True:
            lowest = int(self._at.min())
            if lowest >= _EXITED:
                return None
            if lowest >= _WAITING:
                self._release(lowest)
                continue
            mask = self._at == lowest
            if self.program.blocks[lowest].collective:
                mask |= self._at == lowest + _WAITING
                mask = self._complete_warps(lowest, mask)
                if not mask.any():
                    continue
            return lowest, None if mask.all() else mask

    def _complete_warps(self, number: int, mask: Bools) -> Bools:
        """Lanes whose fellows are all here; the others wait for them."""
        ready = mask & ~self._lacking(number, mask)
        self._at[mask & ~ready] = number + _WAITING
        self._at[ready] = number
        return ready

    def _lacking(self, number: int, mask: Bools) -> Bools:
        """Lanes in a warp of which some lane waits in vain."""
        bit = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
        here = (mask.reshape(-1, WARP) * bit).sum(axis=1, dtype=np.uint32)
        named = np.broadcast_to(self._members[number](), (self.frame.lanes,)).reshape(-1, WARP)
        lacking = ((named & ~here[:, None]) != 0) | ((named & bit) == 0)
        return np.repeat((lacking & mask.reshape(-1, WARP)).any(axis=1), WARP)

    def _refuse_absent(self, number: int) -> None:
        """All lanes are here; each must also name itself."""
        everyone = np.ones(self.frame.lanes, np.bool_)
        if self._lacking(number, everyone).any():
            self._refuse_warp(number, everyone)

    def _release(self, lowest: int) -> None:
        """Nobody can run: let the CTAs pass that wait at the lowest barrier, or say who waits in vain."""
        number = lowest - _WAITING
        block = self.program.blocks[number]
        waiting = self._at == lowest
        if block.ending != "barrier":
            self._refuse_warp(number, waiting)
        rows = self._at.reshape(self.frame.count, -1)
        here = waiting.reshape(rows.shape)
        ctas = here.any(axis=1)
        partial = ctas & ~here.all(axis=1)
        if partial.any():
            cta = int(partial.argmax())
            self._refuse_barrier(block, cta, rows[cta], here[cta])
        rows[ctas] = number + 1
        self._pass(ctas)

    def _refuse_barrier(self, block: Block, cta: int, at: Array, here: Bools) -> None:
        missing = int((~here).argmax())
        lane = cta * self.frame.geometry.threads + int(here.argmax())
        where = int(at[missing])
        if where >= _EXITED:
            raise self._error(block.last - 1, Reason.DIVERGENT_BARRIER, f"thread {missing} has exited", lane)
        other = self.program.blocks[where - _WAITING]
        line = self.program.entry.instructions[
            other.last - 1 if other.ending == "barrier" else other.first
        ].line
        reason = Reason.DIVERGENT_BARRIER if other.ending == "barrier" else Reason.DEADLOCK
        raise self._error(block.last - 1, reason, f"thread {missing} waits at line {line}", lane)

    def _refuse_warp(self, number: int, waiting: Bools) -> None:
        lacking = self._lacking(number, waiting)
        lane = int(lacking.argmax())
        warp = slice(lane // WARP * WARP, lane // WARP * WARP + WARP)
        absent = np.flatnonzero(~waiting[warp])
        who = (
            f"lanes {absent.tolist()} of the warp are not here"
            if absent.size
            else "a lane not in its own mask"
        )
        raise self._error(self.program.blocks[number].first, Reason.DIVERGENT_WARP, who, lane)

    def _error(self, i: int, reason: Reason, message: str, lane: int) -> PtxError:
        return self.frame.error(self.program.entry.instructions[i], reason, message, lane)

    def opcodes(self) -> Counter[str]:
        """Thread instructions by spelling, those under a false guard included."""
        total: Counter[str] = Counter()
        for block, count in zip(self.program.blocks, self.executed, strict=True):
            if count:
                for instruction in self.program.entry.instructions[block.first : block.last]:
                    total[instruction.mnemonic] += count
        return total
