"""A schedule's messages between GPU ranks, in buffers that are used again; streams keep them apart, no host waits.

F doubles what comes from the stage before, I halves what comes from behind; both by a kernel on the rank's stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hybridcomm.selftest.rank import Rank, all_differ, numbers
from train.pipeline import Instruction, PipelineSchedule, batch_ends, check, lower, make_schedule
from train.pipeline.instructions import RECEIVE, SEND

__all__ = ["Lanes", "lanes"]

NUMEL, MICROBATCHES, RING = 96, 6, 3
"""Of a ring's buffers one is computed from, one has been asked for, and one more batch may have begun."""


class Lanes:
    """One rank's list, put on its stream and the engine's."""

    def __init__(self, rank: Rank, schedule: PipelineSchedule) -> None:
        self.rank, self.schedule = rank, schedule
        self.group = rank.device.group(range(schedule.ranks))
        self.rooms = {op: self._tensors(RING) for op in ("RECV_F", "RECV_I", "SEND_F", "SEND_I")}
        self.results = {op: self._tensors(MICROBATCHES) for op in ("F", "I")}
        self.first = [rank.upload(numbers(NUMEL, number)) for number in range(MICROBATCHES)]
        self.batch: list[tuple[Instruction, torch.Tensor]] = []
        self.works: dict[tuple[str, int], Any] = {}

    def _tensors(self, count: int) -> list[torch.Tensor]:
        return [self.rank.upload(torch.zeros(NUMEL)) for _ in range(count)]

    def run(self) -> None:
        mine = self.schedule.lists[self.rank.rank]
        ends = batch_ends(mine)
        for entry in mine:
            if entry.op == "W":
                continue
            if entry.op not in SEND + RECEIVE:
                self.compute("F" if entry.op == "F" else "I", entry.microbatch)
                continue
            self.batch.append((entry, self.room(entry.op, entry.microbatch)))
            if entry in ends:
                self.start()
        for work in self.works.values():
            work.wait()
        self.works.clear()

    def room(self, op: str, microbatch: int) -> torch.Tensor:
        return self.rooms[op][microbatch % RING]

    def start(self) -> None:
        """Receives first: a group has no order."""
        self.batch.sort(key=lambda each: each[0].op in SEND)
        work = self.group.batch([(entry.op in SEND, room, entry.peer) for entry, room in self.batch])
        self.works |= {(entry.op, entry.microbatch): work for entry, _ in self.batch}
        self.batch.clear()

    def compute(self, op: str, microbatch: int) -> None:
        """What was sent from the buffer before has to be gone, what is computed from to be there."""
        for key in ((f"SEND_{op}", microbatch - RING), (f"RECV_{op}", microbatch)):
            if key in self.works:
                self.works[key].wait()
        begins = self.rank.rank == (0 if op == "F" else self.schedule.ranks - 1)
        source = self.first[microbatch] if begins else self.room(f"RECV_{op}", microbatch)
        factor = 2.0 if op == "F" else 0.5
        targets = [self.room(f"SEND_{op}", microbatch), self.results[op][microbatch]]
        self.rank.torch.copy(targets, [source, source], factor)


def lanes(
    schedule: str, made: Callable[[Rank, PipelineSchedule], Lanes] = Lanes
) -> Callable[[Rank], list[str]]:
    def body(rank: Rank) -> list[str]:
        ranks = rank.device.world_size
        lowered = lower(make_schedule(schedule, ranks, MICROBATCHES), rendezvous=True)
        check(lowered, rendezvous=True)
        lane = made(rank, lowered)
        for _ in range(2):
            lane.run()
        forward, backward = 2.0 ** (rank.rank + 1), 0.5 ** (ranks - rank.rank)
        return [
            *all_differ(rank, lane.results["F"], [numbers(NUMEL, i) * forward for i in range(MICROBATCHES)]),
            *all_differ(rank, lane.results["I"], [numbers(NUMEL, i) * backward for i in range(MICROBATCHES)]),
        ]

    return body
