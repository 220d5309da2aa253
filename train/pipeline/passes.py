"""Lowering passes: each takes a schedule and returns one with more instructions, in an order that overlaps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from train.errors import ScheduleError
from train.pipeline.costs import Costs
from train.pipeline.head import split_head
from train.pipeline.instructions import COMPUTE, SEND, Instruction, PipelineSchedule
from train.pipeline.lines import LINE_OPS, OP, Numbers, lines_of
from train.pipeline.rendezvous import add_rendezvous
from train.pipeline.table import Table, numbering

__all__ = ["add_communication", "add_reduce", "lower"]


def lower(
    schedule: PipelineSchedule,
    *,
    head: bool = False,
    buckets: int | Sequence[int] = 0,
    costs: Costs | None = None,
    rendezvous: bool = False,
) -> PipelineSchedule:
    """All passes, in their order: `split_head` if asked for, `add_communication`, `add_reduce` if there are buckets.

    ``costs`` (without a head) tell `split_head` what runs when. ``rendezvous``: messages get one order on all ranks
    (`add_rendezvous`), as GPUs need it. The result is what a runtime executes.
    """
    if head:
        schedule = split_head(schedule, costs)
    schedule = add_rendezvous(schedule, costs) if rendezvous else add_communication(schedule)
    return schedule if buckets == 0 else add_reduce(schedule, buckets)


def add_communication(schedule: PipelineSchedule, *, ahead: int = 1) -> PipelineSchedule:
    """Adds SEND_F, RECV_F, SEND_I and RECV_I where neighbouring stages are on different ranks.

    A SEND follows the computation that makes its value. A RECV only asks (the wait is where the value is used), so
    it stands before the computation ``ahead`` places earlier, beside which the transfer runs; earlier still where a
    later message on the same channel is used first, because a channel (source, target, kind) keeps the order of
    its sends.
    """
    if schedule.communicates:
        raise ScheduleError(f"schedule {schedule.name} communicates already")
    if ahead < 0:
        raise ScheduleError(f"ahead={ahead}: a receive cannot be asked for after its use")
    table, count = schedule.table, schedule.microbatches
    lines = lines_of(replace(schedule, communicates=True))
    channel, send, receive = lines.channels
    forward = send < lines.number(("SEND_I", 0))
    value = np.where(forward, OP["F"], OP["I"]) * lines.units  # of what is sent, the line of unit 0
    made, used = (table.by_line[value + lines.unit[line]] for line in (send, receive))
    missing = np.argwhere(np.maximum(made, used) == table.size)
    if missing.size:
        row, microbatch = missing[0].tolist()
        line = value[row] + lines.unit[(send if made[row, microbatch] == table.size else receive)[row]]
        what = f"{LINE_OPS[line // lines.units]}{lines.unit[line]}.{microbatch}"
        raise ScheduleError(f"rank {lines.rank[line]} lacks {what}: check the lists first")
    asked = _places_before(table, used, ahead)
    order = (channel[:, None] * (table.size + 1) + made).ravel().argsort(kind="stable")
    floor = channel.repeat(count) * (table.size + 1)  # keeps channels apart in the running minimum
    asked = np.minimum.accumulate((asked.ravel() + floor)[order][::-1])[::-1] - floor[order]
    texts = numbering(schedule.placement, count).instructions[..., :count]
    new = [texts[line // lines.units, lines.unit[line]].ravel()[order] for line in (send, receive)]
    ranks = [lines.rank[line].repeat(count)[order] for line in (send, receive)]
    at = np.concatenate((made.ravel()[order] + 1, asked))  # sends first: others wait for them
    lists = table.insert(at, np.concatenate(ranks), np.concatenate(new))
    return replace(schedule, communicates=True, lists=lists)


def _places_before(table: Table, used: Numbers, ahead: int) -> Numbers:
    """The entries that stand ``ahead`` computations before these on their rank, or the rank's first computation."""
    computes = np.array([op in COMPUTE for op in (*LINE_OPS, "")])[table.op]
    places = np.flatnonzero(computes)
    number = computes.cumsum() - computes
    first = number[table.begin[:-1]]
    return places[np.maximum(number[used] - ahead, first[table.rank[used]])]


def add_reduce(schedule: PipelineSchedule, buckets: int | Sequence[int]) -> PipelineSchedule:
    """Adds REDUCE for each bucket of each stage right after the stage's last W or B (and what that sends).

    The sum over the replicas then runs beside the cooldown of other stages. ``buckets``: how many each stage has,
    one number for all or one per stage (the split head's shards come last, each rank reduces its own). A stage
    without any (0) has nothing to reduce.
    """
    if schedule.buckets:
        raise ScheduleError(f"schedule {schedule.name} reduces already")
    stages = schedule.stages + schedule.split_head
    counts = (buckets,) * stages if isinstance(buckets, int) else tuple(buckets)
    if len(counts) != stages or min(counts) < 0:
        raise ScheduleError(
            f"buckets {counts}: give {stages} counts >= 0, one per stage (and the split head)"
        )
    lists = []
    for rank, entries in enumerate(schedule.lists):
        out = list(entries)
        for stage, place in _final(entries, len(schedule.stages_of(rank)) + schedule.split_head).items():
            behind = _behind_sends(entries, place) + 1
            out[behind:behind] = [
                Instruction("REDUCE", stage, bucket=bucket) for bucket in range(counts[stage])
            ]
        lists.append(tuple(out))
    return replace(schedule, buckets=counts, lists=tuple(lists))


def _final(entries: Sequence[Instruction], stages: int) -> dict[int, int]:
    """By stage, where its gradients become complete; the last place of the list first."""
    final: dict[int, int] = {}
    for place in range(len(entries) - 1, -1, -1):
        entry = entries[place]
        if entry.op in ("W", "B", "HEAD_T"):
            final.setdefault(entry.stage, place)
            if len(final) == stages:
                break
    return final


def _behind_sends(entries: Sequence[Instruction], place: int) -> int:
    """The last of the sends that directly follow ``place``: another stage waits for them, nobody for a sum."""
    while place + 1 < len(entries) and entries[place + 1].op in SEND:
        place += 1
    return place
