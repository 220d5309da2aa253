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

from dataclasses import replace

import numpy as np

from train.errors import ScheduleError
from train.pipeline.costs import Costs
from train.pipeline.instructions import HEAD, PipelineSchedule
from train.pipeline.lines import OP, Numbers
from train.pipeline.simulator import simulate
from train.pipeline.table import numbering

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
    timeline, table = simulate(schedule, costs), schedule.table
    root = schedule.placement[schedule.last]
    last = table.place[OP["F"], schedule.last]
    if last[-1] == table.size or (np.diff(last) <= 0).any():
        raise ScheduleError(f"schedule {schedule.name}: the last stage must do all microbatches, in order")
    hidden = np.array(timeline.finish[root])[last - table.begin[root]]
    turns = np.array([np.searchsorted(starts, hidden) for starts in timeline.start])
    place, among = _shards(turns, root)
    microbatch, rank = np.arange(schedule.microbatches), np.arange(schedule.ranks)
    begin, end = (edge[:, None, None] for edge in (table.begin[:-1], table.begin[1:]))
    key = ((rank[:, None, None] * (table.size + 2) + place) * _LAST + among) * schedule.microbatches
    order = (key + microbatch[:, None]).ravel().argsort(kind="stable")
    steps = numbering(schedule.placement, schedule.microbatches).instructions
    new = steps[[OP[op] for op in HEAD], schedule.head, : schedule.microbatches].T
    lists = table.insert(
        np.minimum(begin + place, end).ravel()[order],
        rank.repeat(new.size)[order],
        np.tile(new.ravel(), schedule.ranks)[order],
    )
    return replace(schedule, split_head=True, lists=lists)


_TELL, _WEIGHTS, _SCORE, _ASK, _LAST = range(5)


def _shards(turns: Numbers, root: int) -> tuple[Numbers, Numbers]:
    """Where the shards' instructions stand, by rank, microbatch and step: before which place of the old list, and
    where among those there; then by microbatch and step. ``turns[rank, microbatch]``: the place of HEAD_S.
    """
    place = turns[..., None] + (0, 0, 0, 1)
    among = np.full_like(place, (_SCORE, _SCORE, _SCORE, _WEIGHTS))
    # Asking early must not overtake the HEAD_C before: that would be another order than the root's.
    early = np.diff(turns, axis=1, prepend=0) > 0
    early[root] = False
    place[early, 0] -= 1
    among[early, 0] = _ASK
    among[root, :, 0] = _TELL
    return place, among
