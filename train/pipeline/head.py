"""The item head split over all ranks, as a lowering pass: vocabulary parallelism (arXiv 2411.05288, algorithm 2).

Every rank holds a shard of the items. For each microbatch, once the last stage has made the hidden states:

1. HEAD_X: its rank broadcasts them to all ranks.
2. HEAD_S: each rank scores its items and keeps, per token, the largest score, the sum of exponentials, the target's
   score if the target is its own, and its part of the hidden's gradient, scaled by its own sum alone.
3. HEAD_C, the one barrier: all ranks sum up the statistics (loss and true sums); with them each scales its part of the
   gradient, and the parts are added up on the last stage's rank, whose backward waits for this.
4. HEAD_T: each rank makes the gradients of its shard's weights, any time after HEAD_C.

HEAD_X and HEAD_C are collectives of all ranks, in one order; they are only started where they stand: HEAD_S waits for
its hidden states, the last stage's backward and HEAD_T for what HEAD_C brings.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from train.errors import ScheduleError
from train.pipeline.costs import Costs
from train.pipeline.instructions import HEAD, Instruction, PipelineSchedule
from train.pipeline.simulator import simulate

__all__ = ["split_head"]


def split_head(schedule: PipelineSchedule, costs: Costs | None = None) -> PipelineSchedule:
    """Adds HEAD_X, HEAD_S, HEAD_C and HEAD_T of every microbatch on every rank; comes before the other passes.

    Every rank stops for its HEAD_S when, in a simulation with ``costs`` (of the stages, without a head; None: unit
    costs), the last stage has its hidden states: no instruction that is to run later stands before it, so the
    lists can run. HEAD_T follows one computation later. The last stage's rank starts HEAD_X at once, the others
    one computation before their HEAD_S.
    """
    if schedule.split_head:
        raise ScheduleError(f"the head of schedule {schedule.name} is split already")
    if schedule.communicates or schedule.buckets:
        raise ScheduleError(f"schedule {schedule.name} is lowered further already: split_head comes first")
    costs = costs or Costs.unit(schedule)
    if min(stage.seconds(op) for stage in costs.stages for op in ("F", "I", "W", "B")) <= 0:
        raise ScheduleError(
            "split_head goes by the times of a simulation: each of F, I, W and B must take some"
        )
    timeline = simulate(schedule, costs)
    root = schedule.placement[schedule.last]
    hidden = {
        entry.microbatch: finish
        for entry, finish in zip(schedule.lists[root], timeline.finish[root], strict=True)
        if (entry.op, entry.stage) == ("F", schedule.last)
    }
    if list(hidden) != list(range(schedule.microbatches)):
        raise ScheduleError(f"schedule {schedule.name}: the last stage must do all microbatches, in order")
    shards = (
        _shard([bisect_left(starts, time) for time in hidden.values()], schedule.head, rank == root)
        for rank, starts in enumerate(timeline.start)
    )
    lists = (
        sorted([*(((place, _LAST, 0, 0), entry) for place, entry in enumerate(entries)), *shard])
        for entries, shard in zip(schedule.lists, shards, strict=True)
    )
    return replace(
        schedule, split_head=True, lists=tuple(tuple(entry for _, entry in keyed) for keyed in lists)
    )


_Key = tuple[int, int, int, int]
"""Where an instruction stands: before which place of the old list; among those there; microbatch; step."""
_TELL, _WEIGHTS, _SCORE, _ASK, _LAST = range(5)


def _shard(turns: list[int], head: int, root: bool) -> list[tuple[_Key, Instruction]]:
    """The instructions of a rank's shard; ``turns[microbatch]``: the place that its HEAD_S stands before."""
    out: list[tuple[_Key, Instruction]] = []
    for microbatch, turn in enumerate(turns):
        # Asking early must not overtake the HEAD_C before: that would be another order than the root's.
        early = turn > (turns[microbatch - 1] if microbatch else 0)
        if root:
            ask = (turn, _TELL, microbatch, 0)
        else:
            ask = (turn - 1, _ASK, microbatch, 0) if early else (turn, _SCORE, microbatch, 0)
        keys = (
            ask,
            (turn, _SCORE, microbatch, 1),
            (turn, _SCORE, microbatch, 2),
            (turn + 1, _WEIGHTS, microbatch, 0),
        )
        out += [(key, Instruction(op, head, microbatch)) for key, op in zip(keys, HEAD, strict=True)]
    return out
