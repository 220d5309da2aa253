"""Lowering passes: each takes a schedule and returns one with more instructions, in an order that overlaps them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from train.errors import ScheduleError
from train.pipeline.costs import Costs
from train.pipeline.head import split_head
from train.pipeline.instructions import COMPUTE, SEND, Instruction, PipelineSchedule

__all__ = ["add_communication", "add_reduce", "lower"]


def lower(
    schedule: PipelineSchedule,
    *,
    head: bool = False,
    buckets: int | Sequence[int] = 0,
    costs: Costs | None = None,
) -> PipelineSchedule:
    """All passes, in their order: `split_head` if asked for, `add_communication`, `add_reduce` if there are buckets.

    ``costs`` (without a head) tell `split_head` what runs when. The result is what a runtime executes.
    """
    if head:
        schedule = split_head(schedule, costs)
    schedule = add_communication(schedule)
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
    sends: dict[tuple[str, int, int], list[Instruction]] = defaultdict(list)
    lists: list[list[tuple[float, Instruction]]] = []
    for rank, entries in enumerate(schedule.lists):
        out: list[tuple[float, Instruction]] = []
        for place, entry in enumerate(entries):
            out.append((place, entry))
            send = _send_after(schedule, entry)
            if send is not None:
                out.append((place + 0.25, send))
                sends[send.op, rank, send.peer].append(send)
        lists.append(out)
    for (op, source, target), messages in sends.items():
        lists[target] += _receives(schedule, op, source, target, messages, ahead)
    return replace(schedule, communicates=True, lists=_ordered(lists))


def _send_after(schedule: PipelineSchedule, entry: Instruction) -> Instruction | None:
    step = {"F": 1, "I": -1, "B": -1}.get(entry.op)
    peer = schedule.peer(entry.stage, step) if step else -1
    return (
        Instruction("SEND_F" if step == 1 else "SEND_I", entry.stage, entry.microbatch, peer)
        if peer >= 0
        else None
    )


def _receives(
    schedule: PipelineSchedule,
    op: str,
    source: int,
    target: int,
    messages: Sequence[Instruction],
    ahead: int,
) -> list[tuple[float, Instruction]]:
    """The receives of a channel with their places in the list of ``target``."""
    step, users = (1, ("F",)) if op == "SEND_F" else (-1, ("I", "B"))
    entries = schedule.lists[target]
    compute = [place for place, entry in enumerate(entries) if entry.op in COMPUTE]
    earlier = {place: compute[max(0, number - ahead)] for number, place in enumerate(compute)}
    used = {
        (entry.stage, entry.microbatch): earlier[place]
        for place, entry in enumerate(entries)
        if entry.op in users
    }
    out: list[tuple[float, Instruction]] = []
    place = float(len(entries))
    for send in reversed(messages):
        stage = send.stage + step
        if (stage, send.microbatch) not in used:
            raise ScheduleError(
                f"rank {target} lacks {users[0]}{stage}.{send.microbatch}: check the lists first"
            )
        place = min(place, used[stage, send.microbatch] - 0.5)
        out.append((place, Instruction(op.replace("SEND", "RECV"), stage, send.microbatch, source)))
    return out[::-1]


def _ordered(
    lists: Iterable[list[tuple[float, Instruction]]],
) -> tuple[tuple[Instruction, ...], ...]:
    return tuple(tuple(entry for _, entry in sorted(entries, key=lambda pair: pair[0])) for entries in lists)


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
    for entries in schedule.lists:
        final = {
            entry.stage: place for place, entry in enumerate(entries) if entry.op in ("W", "B", "HEAD_T")
        }
        after = {_behind_sends(entries, place): stage for stage, place in final.items()}
        out: list[Instruction] = []
        for place, entry in enumerate(entries):
            out.append(entry)
            stage = after.get(place, -1)
            out += [
                Instruction("REDUCE", stage, bucket=bucket) for bucket in range(counts[stage] * (stage >= 0))
            ]
        lists.append(tuple(out))
    return replace(schedule, buckets=counts, lists=tuple(lists))


def _behind_sends(entries: Sequence[Instruction], place: int) -> int:
    """The last of the sends that directly follow ``place``: another stage waits for them, nobody for a sum."""
    while place + 1 < len(entries) and entries[place + 1].op in SEND:
        place += 1
    return place
