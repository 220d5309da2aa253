"""What came of a simulation: when each instruction happens, how long ranks idle and for what."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from train.errors import ScheduleError
from train.pipeline.instructions import COMPUTE, Instruction, PipelineSchedule

__all__ = ["Timeline"]


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Times in s from the start of the step, by rank and place in its list.

    Of a computation ``start`` and ``finish`` say when it runs; of what is sent or asked for, when that is posted and
    when it has arrived; of a bucket, when its sum begins and ends. ``made[rank][place]``: when the last value that
    a computation takes from another rank had been computed there.
    """

    schedule: PipelineSchedule
    start: tuple[tuple[float, ...], ...]
    finish: tuple[tuple[float, ...], ...]
    made: tuple[tuple[float, ...], ...]

    @cached_property
    def step_time(self) -> float:
        return max((time for times in self.finish for time in times), default=0.0)

    @cached_property
    def work(self) -> tuple[float, ...]:
        """s that each rank computes."""
        return tuple(sum(end - begin for _, begin, end, _ in self._computed(r)) for r in self._ranks)

    @property
    def idle(self) -> tuple[float, ...]:
        """s that each rank does not compute."""
        return tuple(self.step_time - work for work in self.work)

    @property
    def bubble(self) -> float:
        """Idle time of all ranks as a part of their time, 0 to 1."""
        return sum(self.idle) / (len(self.work) * self.step_time) if self.step_time else 0.0

    @cached_property
    def idle_by_stage(self) -> tuple[float, ...]:
        """s that ranks wait before an instruction of a stage; a split head is one stage more.

        What is idle beyond that is behind the ranks' last instructions.
        """
        idle = [0.0] * (self.schedule.stages + self.schedule.split_head)
        for rank in self._ranks:
            free = 0.0
            for entry, begin, end, _ in self._computed(rank):
                idle[entry.stage] += begin - free
                free = end
        return tuple(idle)

    @cached_property
    def exposed_communication(self) -> tuple[float, ...]:
        """s that each rank waits for values that have been computed and are on their way."""
        out = []
        for rank in self._ranks:
            free = waited = 0.0
            for _, begin, end, made in self._computed(rank):
                waited += max(0.0, begin - max(free, made))
                free = end
            out.append(waited)
        return tuple(out)

    @property
    def exposed_reduce(self) -> float:
        """s between the last computation of all ranks and the end of the last bucket's sum."""
        return self.step_time - max(end for r in self._ranks for _, _, end, _ in self._computed(r))

    @property
    def _ranks(self) -> range:
        return range(self.schedule.ranks)

    def _computed(self, rank: int) -> list[tuple[Instruction, float, float, float]]:
        """(instruction, start, finish, made) of what ``rank`` computes."""
        rows = zip(
            self.schedule.lists[rank], self.start[rank], self.finish[rank], self.made[rank], strict=True
        )
        return [row for row in rows if row[0].op in COMPUTE]

    def grid(self, marks: Collection[tuple[int, Instruction]] = ()) -> str:
        """Slots of one second by ranks; times must be whole, as with unit costs.

        ``F3`` is the forward of microbatch 3 in the rank's first stage, ``F3'`` in its second; S and T are those of
        the head. What takes two slots is followed by ``-``, idle slots are dots. ``marks``: (rank, instruction)
        shown as ``*F3``.
        """
        rows = []
        for rank in self._ranks:
            slots: dict[int, str] = {}
            for entry, begin, end, _ in self._computed(rank):
                if begin != int(begin) or end != int(end):
                    raise ScheduleError(f"{entry} runs from {begin} to {end}: a grid needs unit costs")
                slots |= dict.fromkeys(range(int(begin), int(end)), "-")
                slots[int(begin)] = ("*" if (rank, entry) in marks else "") + self._cell(rank, entry)
            rows.append([slots.get(slot, ".") for slot in range(int(self.step_time))])
        width = max((len(cell) for row in rows for cell in row), default=1)
        return "\n".join(
            f"rank {rank:2d} | " + " ".join(f"{cell:<{width}}" for cell in row).rstrip()
            for rank, row in enumerate(rows)
        )

    def _cell(self, rank: int, entry: Instruction) -> str:
        if entry.stage == self.schedule.head:
            return f"{entry.op[-1]}{entry.microbatch}"
        return f"{entry.op}{entry.microbatch}" + "'" * self.schedule.stages_of(rank).index(entry.stage)
