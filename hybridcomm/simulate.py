"""A small discrete-event core: tasks with durations, dependencies and resources -> start and finish times.

1. A task is ready when all tasks it comes ``after`` have finished and its stream has reached it.
2. A ready task starts as soon as all its resources are free, and holds them for its duration; of several
   that wait for a resource, the one that was ready first goes first (then the one that was added first).
3. It finishes ``latency`` later: that holds back those after it, but neither its resources nor its stream.

Nothing is random and no clock is read: equal tasks give equal times. Plans (`hybridcomm.cost`) and any other
schedule that can be written as tasks share it.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from hybridcomm.errors import PlanError

__all__ = ["Schedule", "Tasks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    duration: float
    latency: float
    resources: tuple[Hashable, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Times in s from the start, by task: ``start[i]`` to ``finish[i]`` (its latency included)."""

    start: tuple[float, ...]
    finish: tuple[float, ...]

    @property
    def makespan(self) -> float:
        """When the last task has finished; 0 for no tasks."""
        return max(self.finish, default=0.0)


class Tasks:
    """Collects tasks; ``schedule()`` plays them."""

    def __init__(self) -> None:
        self._tasks: list[_Task] = []
        self._waits: list[int] = []  # how many tasks (and stream predecessors) each still waits for
        self._next: list[list[int]] = []  # those that wait for its finish
        self._stream_next: list[
            int
        ] = []  # the one behind it in its stream, which waits for its end; -1: none
        self._stream_tail: dict[Hashable, int] = {}

    def add(
        self,
        duration: float,
        *,
        latency: float = 0.0,
        resources: tuple[Hashable, ...] = (),
        stream: Hashable | None = None,
        after: Iterable[int] = (),
    ) -> int:
        """Adds a task and returns its number; ``duration`` and ``latency`` in s.

        ``resources``: held alone while it runs. ``stream``: tasks of one stream run one by one in the order
        they were added. ``after``: numbers of tasks that must have finished; raises `PlanError` for one that
        is not there yet (so there are no cycles) and for negative times.
        """
        number = len(self._tasks)
        before = set(after)
        if before and not 0 <= min(before) <= max(before) < number:
            raise PlanError(
                f"task {number} comes after {sorted(before)}: only earlier tasks can be waited for"
            )
        if duration < 0 or latency < 0:
            raise PlanError(f"task {number}: duration {duration} and latency {latency} must be >= 0")
        self._tasks.append(_Task(duration=duration, latency=latency, resources=resources))
        self._next.append([])
        self._stream_next.append(-1)
        for other in before:
            self._next[other].append(number)
        waits = len(before)
        if stream is not None:
            tail = self._stream_tail.get(stream, -1)
            if tail >= 0:
                self._stream_next[tail] = number
                waits += 1
            self._stream_tail[stream] = number
        self._waits.append(waits)
        return number

    def schedule(self) -> Schedule:
        """Start and finish of every task; linear in tasks and dependencies, but for the waiting queues."""
        return _Run(self._tasks, list(self._waits), self._next, self._stream_next).play()


@dataclass(slots=True)
class _Run:
    tasks: list[_Task]
    waits: list[int]
    next: list[list[int]]
    stream_next: list[int]
    busy: set[Hashable] = field(default_factory=set)
    queues: dict[Hashable, list[tuple[float, int]]] = field(default_factory=dict)
    events: list[tuple[float, int, int]] = field(default_factory=list)  # (time, task, 0: end, 1: finish)
    start: list[float] = field(default_factory=list)
    finish: list[float] = field(default_factory=list)

    def play(self) -> Schedule:
        self.start, self.finish = [-1.0] * len(self.tasks), [-1.0] * len(self.tasks)
        for number, waits in enumerate(self.waits):
            if waits == 0:
                self._ready(number, 0.0)
        while self.events:
            now, number, what = heapq.heappop(self.events)
            if what == 0:
                self._end(number, now)
            else:
                for other in self.next[number]:
                    self._count_down(other, now)
        return Schedule(start=tuple(self.start), finish=tuple(self.finish))

    def _count_down(self, number: int, now: float) -> None:
        self.waits[number] -= 1
        if self.waits[number] == 0:
            self._ready(number, now)

    def _ready(self, number: int, now: float) -> None:
        for resource in self.tasks[number].resources:
            if resource in self.busy:
                heapq.heappush(self.queues.setdefault(resource, []), (now, number))
                return
        self._start(number, now)

    def _start(self, number: int, now: float) -> None:
        task = self.tasks[number]
        self.busy.update(task.resources)
        self.start[number] = now
        self.finish[number] = now + task.duration + task.latency
        heapq.heappush(self.events, (now + task.duration, number, 0))
        heapq.heappush(self.events, (self.finish[number], number, 1))

    def _end(self, number: int, now: float) -> None:
        resources = self.tasks[number].resources
        self.busy.difference_update(resources)
        for resource in resources:
            self._wake(resource, now)
        behind = self.stream_next[number]
        if behind >= 0:
            self._count_down(behind, now)

    def _wake(self, resource: Hashable, now: float) -> None:
        """A task waits in the queue of one busy resource; if another of its own is busy, it waits there."""
        queue = self.queues.get(resource)
        while queue and resource not in self.busy:
            since, number = heapq.heappop(queue)
            blocked = next((r for r in self.tasks[number].resources if r in self.busy), None)
            if blocked is None:
                self._start(number, now)
            else:
                heapq.heappush(self.queues.setdefault(blocked, []), (since, number))
