"""One order of messages: no schedule deadlocks where senders wait too, alone or in batches, and it costs no time.

That is the checker's word, held here against streams that are played one operation at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from tests.train.pipeline.builders import before, swapped, without
from tests.train.pipeline.test_every_schedule import (
    MICROBATCHES,
    RANKS,
    computation,
    uneven,
    written,
)
from train.errors import ScheduleError
from train.pipeline import (
    Costs,
    Instruction,
    PipelineSchedule,
    StageCost,
    add_rendezvous,
    batch_ends,
    check,
    lower,
    simulate,
    split_head,
)
from train.pipeline.instructions import COMPUTE, RECEIVE, SEND


@pytest.mark.parametrize("ranks", range(1, RANKS + 1))
def test_no_schedule_deadlocks_where_senders_wait(ranks: int) -> None:
    """Of every size a third of the kinds, by turns; every other one by uneven stages."""
    for microbatches in range(1, MICROBATCHES + 1):
        for schedule in [*written(ranks, microbatches)][(ranks + microbatches) % 3 :: 3]:
            costs = uneven(schedule) if microbatches % 2 else None
            lowered = lower(schedule, rendezvous=True, buckets=1, costs=costs)
            check(lowered, rendezvous=True)
            assert np.array_equal(computation(lowered), computation(schedule))


@pytest.mark.parametrize("microbatches", [1, 3, 8])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_it_takes_no_more_time(ranks: int, microbatches: int) -> None:
    for schedule in written(ranks, microbatches):
        for costs in (None, uneven(schedule)):
            lowered = add_rendezvous(schedule, costs)
            assert simulate(lowered, costs).step_time == simulate(schedule, costs).step_time


# -- streams, one operation at a time -----------------------------------------------------------------------

Ends = Callable[[Sequence[Instruction]], frozenset[Instruction]]


@dataclass
class Streams:
    """A rank's two streams: computations, and batches of messages, each behind what it waits for."""

    computes: list[tuple[str, set[str]]] = field(default_factory=list)
    batches: list[tuple[list[Instruction], set[str]]] = field(default_factory=list)


def streams_of(entries: Sequence[Instruction], ends: frozenset[Instruction]) -> Streams:
    """As the engine puts a list on streams: a batch waits for what was computed before, a value for its batch."""
    out, batch, last = Streams(), [], set()
    arrives: dict[tuple[str, int, int], str] = {}
    for entry in entries:
        if entry.op in SEND + RECEIVE:
            batch.append(entry)
            if entry.op in RECEIVE:
                arrives[entry.op[-1], entry.stage, entry.microbatch] = str(entry)
            if entry in ends:
                out.batches.append((batch, set(last)))
                batch = []
        elif entry.op in COMPUTE:
            key = ("I" if entry.op == "B" else entry.op, entry.stage, entry.microbatch)
            out.computes.append((str(entry), {arrives[key]} if key in arrives else set()))
            last = {str(entry)}
    assert not batch
    return out


def other_side(rank: int, entry: Instruction) -> tuple[int, str]:
    kind, sends = entry.op[-1], entry.op in SEND
    stage = entry.stage + (1 if (kind == "F") == sends else -1)
    op = f"{'RECV' if sends else 'SEND'}_{kind}"
    return entry.peer, str(Instruction(op, stage, entry.microbatch, rank))


def stuck(schedule: PipelineSchedule, ends: Ends = batch_ends) -> list[int]:
    """Ranks whose streams never end."""
    ranks = [streams_of(entries, ends(entries)) for entries in schedule.lists]
    done: list[set[str]] = [set() for _ in ranks]
    met: set[tuple[int, str]] = set()
    moved = True
    while moved:
        begun = {
            (rank, str(entry)): other_side(rank, entry)
            for rank, at in enumerate(ranks)
            if at.batches and at.batches[0][1] <= done[rank]
            for entry in at.batches[0][0]
        }
        now = {side for side, other in begun.items() if other in begun}
        moved = bool(now - met)
        met |= now
        for rank, at in enumerate(ranks):
            if at.batches and all((rank, str(entry)) in met for entry in at.batches[0][0]):
                done[rank] |= {str(entry) for entry in at.batches.pop(0)[0]}
                moved = True
            while at.computes and at.computes[0][1] <= done[rank]:
                done[rank].add(at.computes.pop(0)[0])
                moved = True
    return [rank for rank, at in enumerate(ranks) if at.computes or at.batches]


def each_alone(entries: Sequence[Instruction]) -> frozenset[Instruction]:
    return frozenset(entry for entry in entries if entry.op in SEND + RECEIVE)


def whole_runs(entries: Sequence[Instruction]) -> frozenset[Instruction]:
    """All messages between two computations as one batch."""
    messages = [entry.op in SEND + RECEIVE for entry in (*entries, Instruction("F", 0))]
    return frozenset(
        entry for entry, one, then in zip(entries, messages, messages[1:], strict=False) if one and not then
    )


def lowered() -> Iterator[PipelineSchedule]:
    for ranks, microbatches in ((2, 1), (2, 5), (3, 4), (4, 7)):
        for schedule in written(ranks, microbatches):
            for costs in (None, uneven(schedule)):
                yield lower(schedule, rendezvous=True, costs=costs)


@pytest.mark.parametrize("ends", [batch_ends, each_alone, whole_runs])
def test_streams_come_to_their_end(ends: Ends) -> None:
    """However messages between two computations are gathered."""
    assert [schedule.name for schedule in lowered() if stuck(schedule, ends)] == []


def test_lists_for_buffered_messages_deadlock_on_streams_and_are_refused() -> None:
    for schedule in written(3, 4):
        for_hosts = lower(schedule)
        check(for_hosts)
        assert stuck(for_hosts, each_alone)
        with pytest.raises(ScheduleError, match=r"deadlock: rank . stands at (SEND|RECV)"):
            check(for_hosts, rendezvous=True)


def receives_first(schedule: PipelineSchedule) -> PipelineSchedule:
    """Within each batch, which is free to have any order."""
    lists = []
    for entries in schedule.lists:
        out, batch = [], []
        ends = batch_ends(entries)
        for entry in entries:
            if entry.op not in SEND + RECEIVE:
                out.append(entry)
                continue
            batch.append(entry)
            if entry in ends:
                out += sorted(batch, key=lambda each: each.op in SEND)
                batch = []
        lists.append(tuple(out))
    return replace(schedule, lists=tuple(lists))


def test_neighbours_exchange_in_one_batch_and_ungrouped_they_may_deadlock() -> None:
    """In the steady state both ways at once; then the order within a batch counts where it is none."""
    schedule = lower(next(s for s in written(4, 8) if s.name == "1f1b"), rendezvous=True)
    for rank in (1, 2):
        batches = [
            batch for batch, _ in streams_of(schedule.lists[rank], batch_ends(schedule.lists[rank])).batches
        ]
        both = [batch for batch in batches if {entry.op in SEND for entry in batch} == {True, False}]
        assert len(both) >= 4
    other = receives_first(schedule)
    assert other != schedule
    assert not stuck(other)
    assert stuck(other, each_alone)
    with pytest.raises(ScheduleError, match="deadlock"):
        check(other, rendezvous=True)


PLANTED: dict[str, tuple[Callable[[PipelineSchedule], PipelineSchedule], str]] = {
    "a dropped receive": (lambda s: without(s, 1, "RECV_F1.3<0"), "rank 1 lacks RECV_F1.3<0"),
    "messages swapped on one side": (
        lambda s: swapped(s, 1, "SEND_F1.1>2", "RECV_I1.0<2"),
        "deadlock: rank 0 stands at RECV_I0.0<1, which waits for SEND_I1.0 on rank 1",
    ),
    "a receive asked for before the order comes to it": (
        lambda s: before(s, 2, "RECV_F2.2<1", "I2.1"),
        "deadlock",
    ),
    "a send put off": (lambda s: before(s, 1, "SEND_I1.2>0", "F1.4"), "deadlock"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str) -> None:
    plant, message = PLANTED[bug]
    schedule = lower(next(s for s in written(3, 7) if s.name == "zb-h1"), rendezvous=True)
    with pytest.raises(ScheduleError, match=message) as caught:
        check(plant(schedule), rendezvous=True)
    assert ">>" in str(caught.value)


def test_what_has_no_order_is_refused() -> None:
    schedule = next(s for s in written(3, 4) if s.name == "zbv")
    for other in (lower(schedule), split_head(schedule)):
        with pytest.raises(ScheduleError, match="computation alone"):
            add_rendezvous(other)
    free = StageCost(forward=0.0, input_grad=1.0, weight_grad=1.0)
    with pytest.raises(ScheduleError, match="must take some"):
        add_rendezvous(schedule, Costs(stages=(free,) * schedule.stages))
