"""Is a schedule correct? Everything that can be known before it runs, and how much memory it takes.

1. Completeness: each rank has exactly the instructions that the schedule's facts call for, each once.
2. Channels: a channel (source, target, kind) is received in the order in which it is sent; all ranks have one order
   of the head's collectives; each stage's gradients are accumulated in the order of microbatches.
3. Execution: nothing is used before it is there, and no ranks wait for each other (`train.pipeline.execute`); if asked,
   also where each side of a message waits for the other, as on GPUs.

All entries are looked at at once, in arrays (`train.pipeline.table`); texts and grids are made of what is wrong only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train.errors import ScheduleError
from train.pipeline.execute import broken, execution_order
from train.pipeline.instructions import COMPUTE, OPS, Instruction, PipelineSchedule
from train.pipeline.lines import OP, Numbers
from train.pipeline.table import numbering

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


def check(schedule: PipelineSchedule, *, slots: int | None = None, rendezvous: bool = False) -> Report:
    """Raises `ScheduleError`, whose message has the grid with the step marked, unless the schedule is correct.

    ``slots``: messages that a channel holds before its receiver asks for them, then sends wait; None: sends
    never wait. ``rendezvous``: neither side of a message goes on before the other has come to it, nor a rank at one of
    the head's collectives. Linear in the number of instructions, but for sorting messages that several stages send on
    one channel.
    """
    if not _is_complete(schedule):
        raise _incomplete(schedule)
    _accumulates_in_order(schedule)
    _channels(schedule)
    if schedule.split_head:
        _one_order_of_collectives(schedule)
    execution_order(schedule, slots=slots, rendezvous=rendezvous)
    lines = schedule.table.lines
    return Report(
        peak_activations=_peaks(schedule, lines.activations),
        peak_receives=_peaks(schedule, lines.receives),
        peak_hidden=_peaks(schedule, lines.hidden),
    )


def _peaks(schedule: PipelineSchedule, change: Numbers) -> tuple[int, ...]:
    """By rank: the most that ``change``, by line, sums up to along its list; behind a complete list it is 0 again."""
    table = schedule.table
    return tuple(np.maximum.reduceat(change[table.line].cumsum(), table.begin[:-1]).clip(0).tolist())


# -- completeness ------------------------------------------------------------------------------------------


def _is_complete(schedule: PipelineSchedule) -> bool:
    """Nothing is missing, and there are no more entries than must be: so nothing is there twice."""
    table = schedule.table
    parts = table.size - len(table.others) + np.count_nonzero(table.op == OP["B"])
    needed = table.place[table.lines.wanted]
    found = [(rank, schedule.lists[rank][place]) for rank, place in map(table.event, table.others.tolist())]
    reduces = [(rank, entry) for rank in range(schedule.ranks) for entry in _reduces(schedule, rank)]
    return parts == needed.size and bool((needed < table.size).all()) and sorted(found) == sorted(reduces)


def _reduces(schedule: PipelineSchedule, rank: int) -> list[Instruction]:
    """Every REDUCE that the list of ``rank`` must hold."""
    counts = schedule.buckets or (0,) * (schedule.head + 1)
    stages = (*schedule.stages_of(rank), *([schedule.head] if schedule.split_head else []))
    return [
        Instruction("REDUCE", stage, bucket=bucket) for stage in stages for bucket in range(counts[stage])
    ]


def _wanted(schedule: PipelineSchedule, rank: int) -> set[Instruction]:
    """What the list of ``rank`` must hold, with each B written as I and W."""
    lines, every = schedule.table.lines, numbering(schedule.placement, schedule.microbatches).instructions
    out = set(_reduces(schedule, rank))
    for op, unit in np.argwhere(lines.wanted).tolist():
        if lines.holder[unit] == rank:
            out |= set(every[op, min(unit, schedule.head), : schedule.microbatches].tolist())
    return out


def _incomplete(schedule: PipelineSchedule) -> ScheduleError:
    for rank, entries in enumerate(schedule.lists):
        wanted = _wanted(schedule, rank)
        seen: set[Instruction] = set()
        for place, entry in enumerate(entries):
            for part in _parts(entry):
                if part in seen:
                    return broken(schedule, f"rank {rank} does {part} twice ({entry})", {rank: place})
                if part not in wanted:
                    what = OPS.get(entry.op, "no such op")
                    return broken(
                        schedule, f"{entry} ({what}) has no place in the list of rank {rank}", {rank: place}
                    )
                seen.add(part)
        if seen != wanted:
            return _lacks(schedule, rank, wanted - seen)
    raise AssertionError("a list that is not complete has all of its instructions, each once")


def _lacks(schedule: PipelineSchedule, rank: int, lacking: set[Instruction]) -> ScheduleError:
    missing = min(lacking)
    forward = missing.op.endswith("F")  # then its F lacks it, else a backward does
    kin = [
        place
        for place, entry in enumerate(schedule.lists[rank])
        if entry.op in COMPUTE
        and (entry.stage, entry.microbatch, entry.op == "F") == (missing.stage, missing.microbatch, forward)
    ]
    what = f"rank {rank} lacks {missing} ({len(lacking)} instructions are missing)"
    return broken(schedule, what, {rank: kin[0] if kin else len(schedule.lists[rank])})


def _parts(entry: Instruction) -> tuple[Instruction, ...]:
    return (entry._replace(op="I"), entry._replace(op="W")) if entry.op == "B" else (entry,)


# -- order -------------------------------------------------------------------------------------------------


def _accumulates_in_order(schedule: PipelineSchedule) -> None:
    """Sums of gradients are formed in one order, so they are the same bits as those of one process."""
    places = schedule.table.accumulates
    if (np.diff(places, axis=1) > 0).all():
        return
    order = places.argsort(axis=1)
    wrong = np.argwhere(order != np.arange(schedule.microbatches)).tolist()
    index, following = min((int(places[unit, order[unit, number]]), number) for unit, number in wrong)
    rank, place = schedule.table.event(index)
    entry = schedule.lists[rank][place]
    what = f"{entry} comes where microbatch {following} is next: gradients add up in order"
    raise broken(schedule, what, {rank: place})


def _channels(schedule: PipelineSchedule) -> None:
    table, (channel, sends, receives, _) = schedule.table, schedule.table.messages
    if (np.diff(channel * table.size + receives) > 0).all():
        return
    order = np.lexsort((receives, channel))
    wrong = np.flatnonzero(receives[order] != receives).tolist()
    first = min(wrong, key=lambda number: int(sends[number]))
    (source, put), (target, got) = table.event(int(sends[first])), table.event(int(receives[order[first]]))
    send, receive = schedule.lists[source][put], schedule.lists[target][got]
    what = f"rank {source} sends {send} where rank {target} receives {receive}"
    raise broken(schedule, what, {source: put, target: got})


def _one_order_of_collectives(schedule: PipelineSchedule) -> None:
    table = schedule.table
    places = np.flatnonzero((table.op == OP["HEAD_X"]) | (table.op == OP["HEAD_C"]))
    calls = table.op[places] * schedule.microbatches + table.microbatch[places]
    places, calls = places.reshape(schedule.ranks, -1), calls.reshape(schedule.ranks, -1)
    if (calls == calls[0]).all():
        return
    rank, number = np.argwhere(calls != calls[0])[0].tolist()
    marks = dict(table.event(int(places[other, number])) for other in (0, rank))
    wanted, entry = (schedule.lists[other][marks[other]] for other in (0, rank))
    raise broken(schedule, f"rank {rank} comes to {entry} where rank 0 comes to {wanted}", marks)
