"""What a schedule takes: its lists as tasks on ranks and links, played by `hybridcomm.simulate`.

1. Computation takes its rank's time, one instruction after the other, in the order of the list.
2. Transfers take their links' time and nobody else's: latency alpha, then beta * nbytes. A node has one way out and
   one way in for other nodes; inside a node each pair of ranks has a link of its own.
3. A bucket's sum takes the time that it is said to take, one after the other on its rank, beside all else. One that
   stands right behind its stage's last computation begins when its gradients are complete, inside that.

The head's broadcast and sums go straight from and to the last stage's rank, which is what they cost at least.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from hybridcomm.simulate import Tasks
from hybridcomm.topology import Topology
from train.errors import ScheduleError
from train.pipeline.buckets import BESIDE, final_places
from train.pipeline.costs import Costs
from train.pipeline.execute import execution_order
from train.pipeline.instructions import COMPUTE, RECEIVE, SEND, Instruction, PipelineSchedule
from train.pipeline.lines import OP
from train.pipeline.timeline import Timeline

__all__ = ["simulate"]


def simulate(
    schedule: PipelineSchedule,
    costs: Costs | None = None,
    links: Topology | None = None,
    *,
    rendezvous: bool = True,
) -> Timeline:
    """When everything happens, with these costs (None: `Costs.unit`) and links (None: transfers take no time).

    ``links``: the pipeline's ranks on their nodes, with alpha and beta of both link classes. ``rendezvous``: a
    transfer begins when its receive has been asked for too; else it begins when it is sent. Raises `ScheduleError`
    for lists that do not run, figures for another schedule, and links of a schedule that does not communicate.
    """
    costs = costs or Costs.unit(schedule)
    costs.check(schedule)
    if links is not None and not schedule.communicates:
        raise ScheduleError(
            f"schedule {schedule.name} communicates nothing over links: add_communication first"
        )
    if links is not None and links.world_size != schedule.ranks:
        raise ScheduleError(f"links of {links.world_size} ranks for a pipeline of {schedule.ranks}")
    if not (schedule.communicates or schedule.split_head or schedule.table.others.size):
        return _computation(schedule, costs)
    return _Model(schedule=schedule, costs=costs, links=links, rendezvous=rendezvous).play()


def _computation(schedule: PipelineSchedule, costs: Costs) -> Timeline:
    """Of computation alone, without the core: it begins when its rank is free and what it takes has been made."""
    table, place = schedule.table, schedule.table.place
    order = execution_order(schedule)
    source = np.full(
        table.size + 1, table.size
    )  # whose value an entry takes; at the end what takes and makes none
    source[place[OP["F"], 1:]] = place[OP["F"], :-1]
    source[place[OP["I"], :-1]] = place[OP["I"], 1:]
    seconds = np.array([[stage.seconds(op) for stage in costs.stages] for op in ("F", "I", "W", "B")])
    took = seconds.ravel()[table.line] * (np.array(costs.sizes)[table.microbatch] if costs.sizes else 1.0)
    start, finish = [0.0] * table.size, [0.0] * (table.size + 1)
    free, begin = [0.0] * schedule.ranks, table.begin.tolist()
    sources, durations = source.tolist(), took.tolist()
    for rank, here, end in order:
        now = free[rank]
        for index in range(begin[rank] + here, begin[rank] + end):
            there = finish[sources[index]]
            start[index] = now = max(now, there)
            finish[index] = now = now + durations[index]
        free[rank] = now
    source = source[:-1]
    made = np.where(np.append(table.rank, -1)[source] == table.rank, 0.0, np.array(finish)[source]).tolist()
    rows = [slice(here, end) for here, end in pairwise(begin)]
    return Timeline(
        schedule=schedule,
        **{
            name: tuple(tuple(times[row]) for row in rows)
            for name, times in (("start", start), ("finish", finish), ("made", made))
        },
    )


@dataclass(kw_only=True)
class _Model:
    schedule: PipelineSchedule
    costs: Costs
    links: Topology | None
    rendezvous: bool
    tasks: Tasks = field(default_factory=Tasks)
    computed: dict[tuple[str, int, int, int], int] = field(default_factory=dict)
    """(F, I or HEAD_S, stage, microbatch, rank) -> the task that computes it."""
    posts: dict[tuple[str, int, int], dict[int, int]] = field(default_factory=dict)
    """(kind, receiving stage, microbatch) -> rank -> the task that posts its side."""
    arrived: dict[tuple[str, int, int, int], int] = field(default_factory=dict)
    """(kind, receiving stage, microbatch, rank) -> the task after which it is there."""

    begun: dict[tuple[int, int], int] = field(default_factory=dict)
    """(rank, stage) -> the moment at which its last computation begins."""

    def play(self) -> Timeline:
        schedule = self.schedule
        self.final = [final_places(entries) for entries in schedule.lists]
        self.root = schedule.placement[schedule.last]
        begin: dict[tuple[int, int], int] = {}
        end: dict[tuple[int, int], tuple[str, int, int, int] | int] = {}
        made: dict[tuple[int, int], list[int]] = {}
        events = (
            (rank, place) for rank, here, end in execution_order(schedule) for place in range(here, end)
        )
        for rank, place in events:
            entry = schedule.lists[rank][place]
            event = (rank, place)
            if entry.op in COMPUTE:
                after, made[event] = self._needs(rank, entry)
                if self.final[rank].get(entry.stage) == place:
                    self.begun[rank, entry.stage] = self.tasks.add(0.0, stream=("rank", rank), after=after)
                begin[event] = end[event] = self._compute(rank, entry, after)
            elif entry.op == "REDUCE":
                begin[event] = end[event] = self.tasks.add(
                    self.costs.seconds(entry, rank), stream=("reduce", rank), after=[self._ready(rank, place)]
                )
            else:
                begin[event] = self._post(rank)
                end[event] = self._communicate(rank, entry, begin[event])
        times = self.tasks.schedule()
        rows = [
            [(rank, place) for place in range(len(entries))] for rank, entries in enumerate(schedule.lists)
        ]

        def finish(event: tuple[int, int]) -> float:
            task = end[event]
            return times.finish[task if isinstance(task, int) else self.arrived[task]]

        return Timeline(
            schedule=schedule,
            start=tuple(tuple(times.start[begin[event]] for event in row) for row in rows),
            finish=tuple(tuple(map(finish, row)) for row in rows),
            made=tuple(
                tuple(max((times.finish[task] for task in made.get(event, ())), default=0.0) for event in row)
                for row in rows
            ),
        )

    def _post(self, rank: int) -> int:
        """A moment in the rank's list: after what it computes before, and no time of its own."""
        return self.tasks.add(0.0, stream=("rank", rank))

    def _ready(self, rank: int, place: int) -> int:
        """The moment from which on a bucket may be summed."""
        entries, entry = self.schedule.lists[rank], self.schedule.lists[rank][place]
        ready, final = self.costs.of(entry, rank).ready, self.final[rank][entry.stage]
        if not ready or any(other.op not in BESIDE for other in entries[final + 1 : place]):
            return self._post(rank)
        part = ready[entry.bucket] * self.costs.seconds(entries[final], rank)
        return self.tasks.add(part, after=[self.begun[rank, entry.stage]])

    def _compute(self, rank: int, entry: Instruction, after: list[int]) -> int:
        task = self.tasks.add(self.costs.seconds(entry, rank), stream=("rank", rank), after=after)
        op = "I" if entry.op == "B" else entry.op
        self.computed[op, entry.stage, entry.microbatch, rank] = task
        return task

    def _needs(self, rank: int, entry: Instruction) -> tuple[list[int], list[int]]:
        """Tasks that a computation waits for; those of them, or behind them, that compute on other ranks."""
        schedule, microbatch = self.schedule, entry.microbatch
        if entry.op in ("F", "I", "B"):
            kind, step = ("F", -1) if entry.op == "F" else ("I", 1)
            other = entry.stage + step
            if 0 <= other < schedule.stages:
                source = self.computed[kind, other, microbatch, schedule.placement[other]]
                if schedule.peer(entry.stage, step) < 0:
                    return [source], []
                if not schedule.communicates:
                    return [source], [source]
                return [self.arrived[kind, entry.stage, microbatch, rank]], [source]
        if entry.op == "HEAD_S":
            source = self.computed["F", schedule.last, microbatch, self.root]
            return [self.arrived["HEAD_X", entry.stage, microbatch, rank]], [source] * (rank != self.root)
        if schedule.split_head and (
            entry.op == "HEAD_T" or (entry.stage == schedule.last and entry.op in "IB")
        ):
            scores = [
                self.computed["HEAD_S", schedule.head, microbatch, other] for other in range(schedule.ranks)
            ]
            return [self.arrived["HEAD_C", schedule.head, microbatch, rank]], scores
        return [], []

    # -- transfers -----------------------------------------------------------------------------------------

    def _communicate(self, rank: int, entry: Instruction, post: int) -> tuple[str, int, int, int]:
        """Posts one side of a transfer; when all sides are there it is added. Returns what to look up its end by."""
        if entry.op in SEND + RECEIVE:
            kind = entry.op[-1]
            step = 0 if entry.op in RECEIVE else 1 if kind == "F" else -1
            key = (kind, entry.stage + step, entry.microbatch)
            sides = self.posts.setdefault(key, {})
            sides[rank] = post
            source, target = (rank, entry.peer) if entry.op in SEND else (entry.peer, rank)
            if len(sides) == 2:
                nbytes = self.costs.stages[key[1] - (kind == "F")].nbytes  # what lies between the two stages
                self.arrived[(*key, target)] = self._transfer(kind, source, target, nbytes, sides)
            return (*key, target)
        key = (entry.op, entry.stage, entry.microbatch)
        sides = self.posts.setdefault(key, {})
        sides[rank] = post
        if entry.op == "HEAD_X":
            self._broadcast(key, rank, sides)
        elif len(sides) == self.schedule.ranks:
            self._combine(key, sides)
        return (*key, rank)

    def _broadcast(self, key: tuple[str, int, int], rank: int, sides: dict[int, int]) -> None:
        if self.root not in sides:
            return
        for other in list(sides) if rank == self.root else [rank]:
            nbytes = self.costs.heads[other].hidden_nbytes
            self.arrived[(*key, other)] = self._transfer("X", self.root, other, nbytes, sides)

    def _combine(self, key: tuple[str, int, int], sides: dict[int, int]) -> None:
        """Shards' statistics and parts of the gradient go to the last stage's rank, statistics of all come back."""
        heads, others = self.costs.heads, [rank for rank in sides if rank != self.root]
        there = [
            self._transfer("C", rank, self.root, heads[rank].sends + heads[rank].statistics_nbytes, sides)
            for rank in others
        ]
        combined = self.tasks.add(0.0, after=[*there, sides[self.root]])
        self.arrived[(*key, self.root)] = combined
        for rank in others:
            nbytes = heads[rank].statistics_nbytes
            self.arrived[(*key, rank)] = self._transfer("D", self.root, rank, nbytes, {self.root: combined})

    def _transfer(self, kind: str, source: int, target: int, nbytes: int, sides: dict[int, int]) -> int:
        after = [sides[source]] + ([sides[target]] if self.rendezvous and target in sides else [])
        stream = ("channel", kind, source, target)
        if self.links is None or source == target:
            return self.tasks.add(0.0, stream=stream, after=after)
        nodes = self.links.node_of(source), self.links.node_of(target)
        inside = nodes[0] == nodes[1]
        link = self.links.intra_node if inside else self.links.inter_node
        if link.alpha is None or link.beta is None:
            name = "intra_node" if inside else "inter_node"
            raise ScheduleError(f"link {name} was not measured: set its alpha and beta")
        way = (("link", source, target),) if inside else (("out", nodes[0]), ("in", nodes[1]))
        return self.tasks.add(
            link.beta * nbytes, latency=link.alpha, resources=way, stream=stream, after=after
        )
