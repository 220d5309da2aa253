"""Is a schedule correct? Everything that can be known before it runs, and how much memory it takes.

1. Completeness: each rank has exactly the instructions that the schedule's facts call for, each once.
2. Channels: a channel (source, target, kind) is received in the order in which it is sent; all ranks have one order
   of the head's collectives; each stage's gradients are accumulated in the order of microbatches.
3. Execution: nothing is used before it is there, and no ranks wait for each other (`train.pipeline.execute`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from train.pipeline.execute import broken, execution_order
from train.pipeline.instructions import COMPUTE, OPS, RECEIVE, SEND, Instruction, PipelineSchedule

__all__ = ["Report", "check"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a correct schedule takes, by rank.

    ``peak_activations``: stages' microbatches alive at once, from F until W or B has used them.
    ``peak_receives``: messages asked for and not yet used up by their computation: buffers of one activation.
    ``peak_hidden``: microbatches whose hidden states the rank's shard of the head holds, from HEAD_X to HEAD_T.
    """

    peak_activations: tuple[int, ...]
    peak_receives: tuple[int, ...]
    peak_hidden: tuple[int, ...]


def check(schedule: PipelineSchedule, *, slots: int | None = None) -> Report:
    """Raises `ScheduleError`, whose message has the grid with the step marked, unless the schedule is correct.

    ``slots``: messages that a channel holds before its receiver asks for them, then sends wait; None: sends
    never wait. Linear in the number of instructions.
    """
    for rank in range(schedule.ranks):
        _complete(schedule, rank)
        _accumulates_in_order(schedule, rank)
    _channels(schedule)
    if schedule.split_head:
        _one_order_of_collectives(schedule)
    execution_order(schedule, slots=slots)
    return Report(
        peak_activations=_peaks(schedule, _activations(schedule)),
        peak_receives=_peaks(schedule, _messages(schedule)),
        peak_hidden=_peaks(schedule, {("HEAD_X", schedule.head): 1, ("HEAD_T", schedule.head): -1}),
    )


# -- memory ------------------------------------------------------------------------------------------------


def _peaks(schedule: PipelineSchedule, change: Mapping[tuple[str, int], int]) -> tuple[int, ...]:
    """By rank: the most that ``change``, by op and stage, sums up to along its list."""
    return tuple(
        max(accumulate((change.get(entry[:2], 0) for entry in entries), initial=0))
        for entries in schedule.lists
    )


def _activations(schedule: PipelineSchedule) -> dict[tuple[str, int], int]:
    return {(op, stage): 1 if op == "F" else -1 for stage in range(schedule.stages) for op in ("F", "W", "B")}


def _messages(schedule: PipelineSchedule) -> dict[tuple[str, int], int]:
    """Asked for by a receive, used up by F, I or B of a stage whose neighbour is on another rank."""
    change: dict[tuple[str, int], int] = {}
    for stage in range(schedule.stages) if schedule.communicates else ():
        for step, receive, users in ((-1, "RECV_F", ("F",)), (1, "RECV_I", ("I", "B"))):
            if schedule.peer(stage, step) >= 0:
                change |= {(receive, stage): 1, **{(op, stage): -1 for op in users}}
    return change


# -- completeness ------------------------------------------------------------------------------------------


def _wanted(schedule: PipelineSchedule, rank: int) -> set[Instruction]:
    """What the list of ``rank`` must hold, with each B written as I and W."""
    out = set()
    stages = schedule.stages_of(rank)
    for stage in stages:
        before, behind = schedule.peer(stage, -1), schedule.peer(stage, 1)
        for microbatch in range(schedule.microbatches):
            out |= {Instruction(op, stage, microbatch) for op in ("F", "I", "W")}
            if schedule.communicates and before >= 0:
                out.add(Instruction("RECV_F", stage, microbatch, before))
                out.add(Instruction("SEND_I", stage, microbatch, before))
            if schedule.communicates and behind >= 0:
                out.add(Instruction("SEND_F", stage, microbatch, behind))
                out.add(Instruction("RECV_I", stage, microbatch, behind))
    if schedule.split_head:
        stages = (*stages, schedule.head)
        for microbatch in range(schedule.microbatches):
            out |= {
                Instruction(op, schedule.head, microbatch) for op in ("HEAD_X", "HEAD_S", "HEAD_C", "HEAD_T")
            }
    if schedule.buckets:
        out |= {
            Instruction("REDUCE", stage, bucket=bucket)
            for stage in stages
            for bucket in range(schedule.buckets[stage])
        }
    return out


def _complete(schedule: PipelineSchedule, rank: int) -> None:
    wanted = _wanted(schedule, rank)
    seen: set[Instruction] = set()
    for place, entry in enumerate(schedule.lists[rank]):
        for part in _parts(entry):
            if part in seen:
                raise broken(schedule, f"rank {rank} does {part} twice ({entry})", {rank: place})
            if part not in wanted:
                what = OPS.get(entry.op, "no such op")
                raise broken(
                    schedule, f"{entry} ({what}) has no place in the list of rank {rank}", {rank: place}
                )
            seen.add(part)
    if seen != wanted:
        missing = min(wanted - seen)
        forward = missing.op.endswith("F")  # then its F lacks it, else a backward does
        kin = [
            place
            for place, entry in enumerate(schedule.lists[rank])
            if entry.op in COMPUTE
            and (entry.stage, entry.microbatch, entry.op == "F")
            == (missing.stage, missing.microbatch, forward)
        ]
        what = f"rank {rank} lacks {missing} ({len(wanted - seen)} instructions are missing)"
        raise broken(schedule, what, {rank: kin[0] if kin else len(schedule.lists[rank])})


def _parts(entry: Instruction) -> tuple[Instruction, ...]:
    return (entry._replace(op="I"), entry._replace(op="W")) if entry.op == "B" else (entry,)


# -- order -------------------------------------------------------------------------------------------------


def _accumulates_in_order(schedule: PipelineSchedule, rank: int) -> None:
    """Sums of gradients are formed in one order, so they are the same bits as those of one process."""
    following: Counter[int] = Counter()
    for place, entry in enumerate(schedule.lists[rank]):
        if entry.op in ("W", "B", "HEAD_T"):
            if entry.microbatch != following[entry.stage]:
                what = f"{entry} comes where microbatch {following[entry.stage]} is next: gradients add up in order"
                raise broken(schedule, what, {rank: place})
            following[entry.stage] += 1


def _channels(schedule: PipelineSchedule) -> None:
    sent, received = defaultdict(list), defaultdict(list)
    for rank, entries in enumerate(schedule.lists):
        for place, entry in enumerate(entries):
            if entry.op in SEND:
                sent[entry.op[-1], rank, entry.peer].append((place, entry))
            elif entry.op in RECEIVE:
                received[entry.op[-1], entry.peer, rank].append((place, entry))
    for channel, sends in sent.items():
        kind, source, target = channel
        step = 1 if kind == "F" else -1
        for (put, send), (got, receive) in zip(sends, received[channel], strict=True):
            if (send.stage + step, send.microbatch) != (receive.stage, receive.microbatch):
                what = f"rank {source} sends {send} where rank {target} receives {receive}"
                raise broken(schedule, what, {source: put, target: got})


def _one_order_of_collectives(schedule: PipelineSchedule) -> None:
    orders = [
        [(place, entry) for place, entry in enumerate(entries) if entry.op in ("HEAD_X", "HEAD_C")]
        for entries in schedule.lists
    ]
    for rank, order in enumerate(orders):
        for (first, wanted), (place, entry) in zip(orders[0], order, strict=True):
            if wanted != entry:
                what = f"rank {rank} comes to {entry} where rank 0 comes to {wanted}"
                raise broken(schedule, what, {0: first, rank: place})
