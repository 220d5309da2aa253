"""What the facts of a schedule call for, and what waits for what, wherever in the lists the instructions stand.

A *line* is an op of a stage, on every microbatch; so is an op of a rank's shard of a split head. Both are *units*:
stages come first, shards behind them. What holds of a line holds of each of its microbatches, so there are as many
rules as lines, not as instructions. B is I and W in one; REDUCE is of no microbatch and has no line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from train.pipeline.instructions import HEAD, OPS, RECEIVE, SEND, PipelineSchedule, peer

__all__ = ["LINE_OPS", "OP", "Lines", "Numbers", "lines_of"]

Numbers = npt.NDArray[np.intp]
_Line = tuple[str, int]
"""(op, unit)."""

LINE_OPS = tuple(op for op in OPS if op != "REDUCE")
_HERE = ("F", "I", "W", "B")
OP = {op: number for number, op in enumerate(LINE_OPS)}


def lines_of(schedule: PipelineSchedule) -> Lines:
    """Those of schedules with these facts."""
    return _lines(schedule.placement, schedule.communicates, schedule.split_head)


class Lines:
    """Lines are numbered: that of ``op`` and ``unit`` is ``OP[op] * units + unit``. By units, ops and lines:

    ``holder[unit]``: its rank (-1 behind the last unit). ``unit[line]``, ``rank[line]``: whose a line is.
    ``called_for[op]``: whether lists may have the op; ``wanted[op, unit]``: whether they must have the line, where each
    B is written as I and W.
    ``local``, ``across``: (lines that wait, lines that they wait for), on one rank and on two; a line that waits for
    several has them in the order in which it does.
    ``channels``: (channel, its SEND line, the matching RECV line), by (receiver, sender, F before I).
    ``activations``, ``receives``, ``hidden``: what an instruction adds to what its rank holds of these, by line; see
    `train.pipeline.checker.Report`.
    """

    def __init__(self, placement: tuple[int, ...], communicates: bool, split_head: bool) -> None:
        self.placement, self.communicates, self.split_head = placement, communicates, split_head
        self.stages, self.ranks = len(placement), len(set(placement))
        self.last, self.root = self.stages - 1, placement[-1]
        self.shards = range(self.stages, self.stages + self.ranks if split_head else self.stages)
        self.units = self.stages + len(self.shards)
        holders = [*placement, *range(len(self.shards)), -1]
        self.holder = _fixed(holders)
        ops = (*_HERE, *(SEND + RECEIVE if communicates else ()), *(HEAD if split_head else ()))
        self.called_for = np.array([op in ops for op in (*LINE_OPS, "")])
        self.wanted = np.zeros((len(LINE_OPS), self.units), bool)
        for op, unit in self._called_for():
            self.wanted[OP[op], unit] = True
        needs = list(self._needs())
        self.local, self.across = (
            _columns(
                [
                    (self.number(after), self.number(before))
                    for after, before in needs
                    if (holders[after[1]] == holders[before[1]]) == same
                ],
                2,
            )
            for same in (True, False)
        )
        self.unit = _fixed([*range(self.units)] * len(LINE_OPS))
        self.rank = self.holder[self.unit]
        self.channels = _columns(sorted(self._channels()) if communicates else [], 3)

        stages = range(self.stages)
        self.activations = self._changes(
            {(op, stage): change for stage in stages for op, change in (("F", 1), ("W", -1), ("B", -1))}
        )
        self.receives = self._changes(
            {
                (op, stage): change
                for stage in stages
                for step, ops in ((-1, ("RECV_F", "F")), (1, ("RECV_I", "I", "B")))
                for op, change in zip(ops, (1, -1, -1), strict=False)
                if communicates and self.peer(stage, step) >= 0
            }
        )
        self.hidden = self._changes(
            {(op, shard): change for shard in self.shards for op, change in (("HEAD_X", 1), ("HEAD_T", -1))}
        )

    def number(self, line: _Line) -> int:
        return OP[line[0]] * self.units + line[1]

    def name(self, line: int, microbatch: int) -> str:
        """Of a line's instruction, for errors."""
        stage = min(int(self.unit[line]), self.stages)
        return f"{LINE_OPS[line // self.units]}{stage}.{microbatch} on rank {self.rank[line]}"

    def _changes(self, changes: dict[_Line, int]) -> Numbers:
        """Of all lines and of what is on none."""
        out = np.zeros(len(LINE_OPS) * self.units + 1, np.intp)
        for line, change in changes.items():
            out[self.number(line)] = change
        return out

    def peer(self, stage: int, step: int) -> int:
        """As `PipelineSchedule.peer`."""
        return peer(self.placement, stage, step)

    def _called_for(self) -> Iterator[_Line]:
        for stage in range(self.stages):
            yield from ((op, stage) for op in ("F", "I", "W"))
            if self.communicates and self.peer(stage, -1) >= 0:
                yield from (("RECV_F", stage), ("SEND_I", stage))
            if self.communicates and self.peer(stage, 1) >= 0:
                yield from (("SEND_F", stage), ("RECV_I", stage))
        yield from ((op, shard) for shard in self.shards for op in HEAD)

    def _needs(self) -> Iterator[tuple[_Line, _Line]]:
        """(what waits, for what), of the same microbatch."""
        for stage in range(self.stages):
            if stage > 0:
                yield from self._value("F", stage, -1)
            yield ("I", stage), ("F", stage)
            if stage < self.last:
                yield from self._value("I", stage, 1)
            elif self.split_head:
                yield from self._combined(("I", stage), self.root)
            yield ("W", stage), ("I", stage)
            for op in ("F", "I"):
                if self.wanted[OP[f"SEND_{op}"], stage]:
                    yield (f"SEND_{op}", stage), (op, stage)
        for rank, shard in enumerate(self.shards):
            if rank == self.root:
                yield ("HEAD_X", shard), ("F", self.last)
            yield ("HEAD_S", shard), ("HEAD_X", shard)
            yield ("HEAD_S", shard), ("HEAD_X", self.shards[self.root])
            yield ("HEAD_C", shard), ("HEAD_S", shard)
            yield from self._combined(("HEAD_T", shard), rank)

    def _value(self, op: str, stage: int, step: int) -> Iterator[tuple[_Line, _Line]]:
        """The output of the neighbouring stage, or the gradient that it makes."""
        if self.communicates and self.peer(stage, step) >= 0:
            yield (op, stage), (f"RECV_{op}", stage)
            yield (op, stage), (f"SEND_{op}", stage + step)
        else:
            yield (op, stage), (op, stage + step)

    def _combined(self, line: _Line, rank: int) -> Iterator[tuple[_Line, _Line]]:
        """What HEAD_C brings needs all ranks."""
        own = self.shards[rank]
        yield from ((line, ("HEAD_C", shard)) for shard in (own, *(s for s in self.shards if s != own)))

    def _channels(self) -> Iterator[tuple[int, int, int]]:
        for stage, source in enumerate(self.placement):
            for kind, (op, step) in enumerate((("F", 1), ("I", -1))):
                target = self.peer(stage, step)
                if target >= 0:
                    channel = (target * self.ranks + source) * 2 + kind
                    lines = (f"SEND_{op}", stage), (f"RECV_{op}", stage + step)
                    yield channel, self.number(lines[0]), self.number(lines[1])


@lru_cache(maxsize=64)
def _lines(placement: tuple[int, ...], communicates: bool, split_head: bool) -> Lines:
    return Lines(placement, communicates, split_head)


def _columns(rows: Sequence[tuple[int, ...]], width: int) -> tuple[Numbers, ...]:
    columns = zip(*rows, strict=True) if rows else [()] * width
    return tuple(map(_fixed, columns))


def _fixed(numbers: Sequence[int]) -> Numbers:
    out = np.array(numbers, np.intp)
    out.setflags(write=False)
    return out
