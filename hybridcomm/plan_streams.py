"""Does a set of per-rank programs run to its end? FIFO streams with bounded lanes, simulated without data.

Each rank runs the steps of each stream in program order; a step starts when it is at the head of its stream
and the steps it waits for are done on this rank. Then:

    reduce         a rank hands its chunk to the lane (rank -> root) if fewer than ``slots`` chunks wait;
                   the root is done when every lane has brought its chunk
    gather         the root publishes if its slowest reader is fewer than ``slots`` behind; readers take
    exchange_*     all of the group meet (no buffering: what ends so ends with any amount of it)
    reduce_all     likewise
    (de)compress   alone
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import product

from hybridcomm.errors import PlanError
from hybridcomm.plan import STREAMS, Step

__all__ = ["check_progress"]


def check_progress(programs: Mapping[int, Sequence[Step]], *, slots: int = 4) -> None:
    """Plays programs through to their end.

    Raises `PlanError` with every rank's stuck steps if the programs (rank -> its steps) cannot finish, and
    the step that one side lacks if a rank hands out what nobody takes.
    """
    _Machine(programs, slots).run()


class _Machine:
    def __init__(self, programs: Mapping[int, Sequence[Step]], slots: int) -> None:
        self.slots = slots
        self.queues = {
            (rank, stream): deque(step for step in steps if step.stream == stream)
            for rank, steps in programs.items()
            for stream in STREAMS
        }
        self.member = {rank: {step.id for step in steps} for rank, steps in programs.items()}
        self.done: dict[int, set[int]] = {rank: set() for rank in programs}
        self.lanes: dict[tuple[str, int, int], deque[int]] = {}

    def run(self) -> None:
        """Round after round over the stream heads until nothing moves; the end is the same in any order."""
        todo = deque(self.queues)
        queued = set(todo)
        while todo:
            place = todo.popleft()
            queued.discard(place)
            while self.queues[place]:
                step = self.queues[place][0]
                if not self._advance(place):
                    break
                for other in product(step.group, STREAMS):  # whom this step may have let go on
                    if other not in queued and other != place and self.queues.get(other):
                        todo.append(other)
                        queued.add(other)
        stuck = [(rank, queue[0]) for (rank, _), queue in self.queues.items() if queue]
        if stuck:
            lines = "\n".join(f"    rank {rank} waits in {step}" for rank, step in stuck)
            raise PlanError(f"deadlock: {len(stuck)} streams cannot go on\n{lines}")
        for (kind, source, target), lane in self.lanes.items():
            if lane:
                raise PlanError(
                    f"rank {target} never takes what rank {source} hands out in {kind} step {lane[0]}"
                )

    def _advance(self, place: tuple[int, str]) -> bool:
        """Runs the head of a stream if it can run; True if it did."""
        rank, _ = place
        step = self.queues[place][0]
        if not self._may_start(rank, step):
            return False
        if step.stream == "exchange" or step.op == "reduce_all":
            return self._meet(step)
        if step.op in ("reduce", "reduce_payload"):
            moved = self._collect(step) if rank == step.root else self._put("reduce", rank, step.root, step)
        elif step.op == "gather":
            moved = self._publish(step) if rank == step.root else self._take("gather", step.root, rank, step)
        else:
            moved = True
        if moved:
            self._finish(rank, step)
        return moved

    def _may_start(self, rank: int, step: Step) -> bool:
        return all(before in self.done[rank] for before in step.after if before in self.member[rank])

    def _finish(self, rank: int, step: Step) -> None:
        self.queues[rank, step.stream].popleft()
        self.done[rank].add(step.id)

    def _meet(self, step: Step) -> bool:
        for rank in step.group:
            queue = self.queues.get((rank, step.stream))
            if not queue or queue[0].id != step.id or not self._may_start(rank, step):
                return False
        for rank in step.group:
            self._finish(rank, step)
        return True

    def _lane(self, kind: str, source: int, target: int) -> deque[int]:
        return self.lanes.setdefault((kind, source, target), deque())

    def _put(self, kind: str, source: int, target: int, step: Step) -> bool:
        lane = self._lane(kind, source, target)
        if len(lane) >= self.slots:
            return False
        lane.append(step.id)
        return True

    def _take(self, kind: str, source: int, target: int, step: Step) -> bool:
        lane = self._lane(kind, source, target)
        if not lane or lane[0] != step.id:
            return False
        lane.popleft()
        return True

    def _collect(self, step: Step) -> bool:
        lanes = [self._lane("reduce", rank, step.root) for rank in step.group if rank != step.root]
        if any(not lane or lane[0] != step.id for lane in lanes):
            return False
        for lane in lanes:
            lane.popleft()
        return True

    def _publish(self, step: Step) -> bool:
        lanes = [self._lane("gather", step.root, rank) for rank in step.group if rank != step.root]
        if any(len(lane) >= self.slots for lane in lanes):
            return False
        for lane in lanes:
            lane.append(step.id)
        return True
