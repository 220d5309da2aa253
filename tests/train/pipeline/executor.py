"""Runs the lists of a schedule on symbols, rank by rank: a second opinion, written without the checker's code.

What is produced lies somewhere until it is taken, once; taking what is not there waits. A schedule is right when
everything comes to its end, every stage has worked on the value that it should, gradients have added up in order, and
nothing is left lying about.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from train.pipeline import Instruction, PipelineSchedule

__all__ = ["runs_right"]


class _WaitError(Exception):
    pass


class _WrongError(Exception):
    pass


def runs_right(schedule: PipelineSchedule) -> bool:
    machine = _Machine(schedule)
    try:
        return machine.play()
    except _WrongError:
        return False


class _Machine:
    def __init__(self, schedule: PipelineSchedule) -> None:
        self.s = schedule
        self.there: list[dict[Any, Any]] = [{} for _ in range(schedule.ranks)]
        self.sent: dict[Any, list[Any]] = defaultdict(list)
        self.asked: dict[Any, list[Any]] = defaultdict(list)
        self.matched: Counter[Any] = Counter()
        self.got: set[tuple[int, int]] = set()
        self.called: list[list[Any]] = [[] for _ in range(schedule.ranks)]
        self.gradients: dict[Any, list[int]] = defaultdict(list)
        self.reduced: list[Any] = []
        self.root = schedule.placement[-1]

    def play(self) -> bool:
        places = [0] * self.s.ranks
        moved = True
        while moved:
            moved = False
            for rank, entries in enumerate(self.s.lists):
                while places[rank] < len(entries):
                    try:
                        self.do(rank, entries[places[rank]])
                    except _WaitError:
                        break
                    places[rank] += 1
                    moved = True
        ended = places == [len(entries) for entries in self.s.lists]
        order = list(range(self.s.microbatches))
        summed = [self.gradients[stage] == order for stage in range(self.s.stages)]
        heads = [self.gradients["head", rank] == order for rank in range(self.s.ranks) if self.s.split_head]
        wanted = [
            (stage, rank, bucket)
            for stage, count in enumerate(self.s.buckets)
            for rank in (range(self.s.ranks) if stage == self.s.stages else [self.s.placement[stage]])
            for bucket in range(count)
        ]
        ways = {*self.sent, *self.asked}
        alike = all(calls == self.called[0] for calls in self.called)
        clean = (
            alike and not any(self.there) and all(len(self.sent[way]) == len(self.asked[way]) for way in ways)
        )
        return ended and all(summed) and all(heads) and clean and sorted(wanted) == sorted(self.reduced)

    def take(self, rank: int, *keys: Any, keep: bool = False) -> list[Any]:
        if not all(key in self.there[rank] for key in keys):
            raise _WaitError
        return [self.there[rank][key] if keep else self.there[rank].pop(key) for key in keys]

    def put(self, rank: int, key: Any, value: Any) -> None:
        if key in self.there[rank]:
            raise _WrongError(key)
        self.there[rank][key] = value

    def do(self, rank: int, entry: Instruction) -> None:
        stage, m = entry.stage, entry.microbatch
        if not (
            (stage < self.s.stages and self.s.placement[stage] == rank and "HEAD" not in entry.op)
            or (stage == self.s.stages and self.s.split_head and entry.op.startswith(("HEAD", "REDUCE")))
        ):
            raise _WrongError(entry)
        getattr(self, entry.op)(rank, stage, m, entry)

    def deliver(self, rank: int, stage: int, m: int, forward: bool) -> None:
        """What ``stage`` made goes to the next stage, or lies ready to be sent to it."""
        other, kind = (stage + 1, "input") if forward else (stage - 1, "gradient")
        if not 0 <= other < self.s.stages:
            return
        holder = self.s.placement[other]
        if holder == rank or not self.s.communicates:
            self.put(holder, (kind, other, m), (kind, stage, m))
        else:
            self.put(rank, ("out", kind, stage, m), (kind, stage, m))

    def F(self, rank: int, stage: int, m: int, entry: Instruction) -> None:  # noqa: N802
        if stage > 0 and self.take(rank, ("input", stage, m)) != [("input", stage - 1, m)]:
            raise _WrongError(entry)
        self.put(rank, ("saved", stage, m), True)
        self.deliver(rank, stage, m, True)
        if stage == self.s.last:
            if self.s.split_head:
                self.put(rank, ("hidden", m), True)
            else:
                self.put(rank, ("gradient", stage, m), ("gradient", stage + 1, m))

    def I(self, rank: int, stage: int, m: int, entry: Instruction) -> None:  # noqa: N802, E743
        self.take(rank, ("saved", stage, m), ("gradient", stage, m), keep=True)
        if self.take(rank, ("gradient", stage, m)) != [("gradient", stage + 1, m)]:
            raise _WrongError(entry)
        self.put(rank, ("half", stage, m), True)
        self.deliver(rank, stage, m, False)

    def W(self, rank: int, stage: int, m: int, entry: Instruction) -> None:  # noqa: N802
        self.take(rank, ("half", stage, m), ("saved", stage, m))
        self.gradients[stage].append(m)

    def B(self, rank: int, stage: int, m: int, entry: Instruction) -> None:  # noqa: N802
        self.I(rank, stage, m, entry)
        self.W(rank, stage, m, entry)

    def SEND_F(self, rank: int, stage: int, m: int, entry: Instruction) -> None:  # noqa: N802
        kind = "input" if entry.op == "SEND_F" else "gradient"
        self.sent[kind, rank, entry.peer] += self.take(rank, ("out", kind, stage, m))
        self.match(kind, rank, entry.peer)

    SEND_I = SEND_F

    def RECV_F(self, rank: int, stage: int, m: int, entry: Instruction) -> None:  # noqa: N802
        kind = "input" if entry.op == "RECV_F" else "gradient"
        self.asked[kind, entry.peer, rank].append((kind, stage, m))
        self.match(kind, entry.peer, rank)

    RECV_I = RECV_F

    def match(self, *way: Any) -> None:
        """The nth message of a channel goes where its nth receive says."""
        while self.matched[way] < min(len(self.sent[way]), len(self.asked[way])):
            number = self.matched[way]
            self.matched[way] += 1
            self.put(way[2], self.asked[way][number], self.sent[way][number])

    def REDUCE(self, rank: int, stage: int, m: int, entry: Instruction) -> None:  # noqa: N802
        key = ("head", rank) if stage == self.s.stages else stage
        if self.gradients[key] != list(range(self.s.microbatches)):
            raise _WrongError(entry)
        self.reduced.append((stage, rank, entry.bucket))

    def HEAD_X(self, rank: int, stage: int, m: int, entry: Instruction) -> None:  # noqa: N802
        if rank == self.root:
            self.take(rank, ("hidden", m))
        number = self.call(rank, entry)
        for other, calls in enumerate(self.called):
            if len(calls) > number < len(self.called[self.root]) and (other, number) not in self.got:
                self.got.add((other, number))
                self.put(other, ("local hidden", m), True)

    def HEAD_S(self, rank: int, stage: int, m: int, entry: Instruction) -> None:  # noqa: N802
        self.take(rank, ("local hidden", m))
        self.put(rank, ("scores", m), True)

    def HEAD_C(self, rank: int, stage: int, m: int, entry: Instruction) -> None:  # noqa: N802
        self.take(rank, ("scores", m))
        number = self.call(rank, entry)
        if all(len(calls) > number for calls in self.called):
            for other in range(self.s.ranks):
                self.put(other, ("statistics", m), True)
            self.put(self.root, ("gradient", self.s.last, m), ("gradient", self.s.stages, m))

    def HEAD_T(self, rank: int, stage: int, m: int, entry: Instruction) -> None:  # noqa: N802
        self.take(rank, ("statistics", m))
        self.gradients["head", rank].append(m)

    def call(self, rank: int, entry: Instruction) -> int:
        """Counts a collective; all ranks must come to the same ones in the same order."""
        number = len(self.called[rank])
        if any(len(calls) > number and calls[number] != entry for calls in self.called):
            raise _WrongError(entry)
        self.called[rank].append(entry)
        return number
