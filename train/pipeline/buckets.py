"""The buckets of a rank's stages, launched where REDUCE stands in its list.

One that directly follows the stage's last W, B or HEAD_T goes as soon as its gradients are complete, while that still
computes others; one that was put further down waits until there. The order is that of the list. Sends in between hold
no bucket back, unless they would queue behind it, as on a GPU's one stream: ``queued``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from hybridcomm.reducer import Reducer
from train.errors import ScheduleError
from train.pipeline.instructions import SEND, Instruction, PipelineSchedule
from train.pipeline.trace import Recorder

__all__ = ["BESIDE", "Buckets", "bucket_counts", "final_places"]

BESIDE = (*SEND, "REDUCE")
"""What may stand between a stage's last computation and a bucket that goes as soon as its gradients are complete."""


def final_places(entries: Sequence[Instruction]) -> dict[int, int]:
    """By stage, where in a rank's list its gradients become complete."""
    return {entry.stage: place for place, entry in enumerate(entries) if entry.op in ("W", "B", "HEAD_T")}


def bucket_counts(
    schedule: PipelineSchedule, rank: int, reducers: Mapping[int, Reducer], shared: Reducer | None
) -> list[int]:
    """How many buckets a rank has of each stage, and of its shard of a split head: what REDUCE is to launch."""
    counts = [0] * (schedule.stages + schedule.split_head)
    for stage, reducer in reducers.items():
        counts[stage] = len(reducer.layouts)
    if shared is not None:
        counts[_shared_stage(schedule, rank)] += len(shared.layouts)
    return counts


def _shared_stage(schedule: PipelineSchedule, rank: int) -> int:
    """First or last stage: which of them is done later. Where they share a table, its gradient is complete then."""
    final = final_places(schedule.lists[rank])
    return max((0, schedule.last), key=lambda stage: final.get(stage, -1))


class Buckets:
    """``reducers[stage]`` average the stage's gradients (a split head is one stage more); ``shared`` those of the item
    table that first and last stage have in common, whose buckets come behind those of the one that is done last."""

    def __init__(
        self,
        schedule: PipelineSchedule,
        rank: int,
        reducers: Mapping[int, Reducer],
        shared: Reducer | None = None,
        *,
        queued: bool = False,
    ) -> None:
        self._beside = ("REDUCE",) if queued else BESIDE
        self.list, self.final = schedule.lists[rank], final_places(schedule.lists[rank])
        self.reducers, self.shared = dict(reducers), shared
        self._shared_stage = _shared_stage(schedule, rank)
        for reducer in self.all() if schedule.buckets else ():
            reducer.hold()

    def all(self) -> list[Reducer]:
        """In the order in which they are finalized, which is the same in all replicas."""
        shared = [] if self.shared is None else [self.shared]
        return [*(self.reducers[stage] for stage in sorted(self.reducers, reverse=True)), *shared]

    def of_stage(self, stage: int) -> list[Reducer]:
        """Whose buckets are those of a stage, in their order."""
        own = [self.reducers[stage]] if stage in self.reducers else []
        return own + ([self.shared] if self.shared is not None and stage == self._shared_stage else [])

    def is_final(self, entry: Instruction) -> bool:
        """Whether the stage's gradients are complete behind it."""
        return self.list[self.final[entry.stage]] == entry

    def release_behind(self, stage: int) -> None:
        """Lets those go that are to be launched right behind the stage's last computation."""
        place = self.final[stage] + 1
        while place < len(self.list) and self.list[place].op in self._beside:
            entry = self.list[place]
            found = self._of(entry) if entry.op == "REDUCE" and entry.stage == stage else None
            if found is not None:
                found[0].release(found[1] + 1)
            place += 1

    def shared_ready(self, stage: int) -> None:
        """The table's gradient is complete, if it is with ``stage``."""
        if self.shared is not None and stage == self._shared_stage:
            for parameter in self.shared.parameters:
                self.shared.ready(parameter)

    def launch(self, entry: Instruction) -> None:
        """What REDUCE does; raises `ScheduleError` where gradients are missing."""
        if not self.reducers and self.shared is None:
            raise ScheduleError(f"{entry}: there are no reducers")
        found = self._of(entry)
        if found is None:  # another rank has more of this stage
            return
        reducer, bucket = found
        reducer.release(bucket + 1)
        if not reducer.launched(bucket):
            raise ScheduleError(f"{entry}: not all gradients of the bucket are complete")

    def _of(self, entry: Instruction) -> tuple[Reducer, int] | None:
        own = self.reducers.get(entry.stage)
        if own is not None and entry.bucket < len(own.layouts):
            return own, entry.bucket
        rest = entry.bucket - (0 if own is None else len(own.layouts))
        if self.shared is not None and entry.stage == self._shared_stage and rest < len(self.shared.layouts):
            return self.shared, rest
        return None

    def finalize(self, recorder: Recorder | None) -> float:
        """Means are in ``.grad`` when it returns; s that this took."""
        begin = time.perf_counter()
        for reducer in self.all():
            reducer.finalize()
        end = time.perf_counter()
        if recorder is not None and self.all():
            self._record(recorder, begin, end)
        return end - begin

    def _record(self, recorder: Recorder, begin: float, end: float) -> None:
        """The engine works on a rank's buckets one after the other, for as long as it says."""
        launches = sorted(
            (at, f"REDUCE {name}/{bucket}", seconds)
            for name, reducer in [*self.reducers.items(), ("table", self.shared)]
            if reducer is not None
            for bucket, (at, seconds) in enumerate(reducer.launches())
        )
        free = 0.0
        for at, name, seconds in launches:
            start = max(at, free)
            free = min(start + seconds, max(end, start))
            recorder.add("buckets", name, start, free)
        recorder.add("waits", "buckets", begin, end)
