"""The checker finds every planted bug, and agrees with an executor that shares no code with it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.pipeline.builders import before, moved, schedules, swapped, twice, with_list, without
from tests.train.pipeline.executor import runs_right
from train.errors import ScheduleError
from train.pipeline import Instruction, PipelineSchedule, check, lower, make_schedule

FULL = lower(make_schedule("zbv", 3, 6), head=True, buckets=[2, 1, 2, 1, 1, 3, 1])
SPLIT = lower(make_schedule("zb-h1", 3, 6), buckets=2)


def accepted(schedule: PipelineSchedule) -> bool:
    try:
        check(schedule)
    except ScheduleError:
        return False
    return True


MUTANTS: dict[str, tuple[Callable[[], PipelineSchedule], str]] = {
    "a dropped receive": (lambda: without(SPLIT, 1, "RECV_F1.3<0"), r"rank 1 lacks RECV_F1.3<0"),
    "a dropped send": (lambda: without(SPLIT, 1, "SEND_I1.3>0"), r"rank 1 lacks SEND_I1.3>0"),
    "two swapped sends": (
        lambda: before(SPLIT, 0, "SEND_F0.0>1", "F0.2"),
        r"rank 0 sends SEND_F0.1>1 where rank 1 receives RECV_F1.0<0",
    ),
    "two swapped receives": (
        lambda: swapped(SPLIT, 1, "RECV_F1.0<0", "RECV_F1.1<0"),
        r"rank 0 sends SEND_F0.0>1 where rank 1 receives RECV_F1.1<0",
    ),
    "a W before its I": (lambda: swapped(SPLIT, 2, "I2.3", "W2.3"), r"W2.3 .*(before its I2.3|is next)"),
    "an I before its F": (lambda: before(SPLIT, 2, "I2.3", "F2.3"), r"I2.3 stands before its F2.3"),
    "a microbatch counted twice": (lambda: twice(SPLIT, 1, "W1.2"), r"rank 1 does W1.2 twice"),
    "a microbatch left out": (lambda: without(SPLIT, 1, "W1.2"), r"rank 1 lacks W1.2"),
    "a W counted beside its B": (
        lambda: swapped(SPLIT, 1, "I1.2", "B1.2"),
        r"rank 1 does W1.2 twice",
    ),
    "a bucket reduced one op early": (
        lambda: moved(SPLIT, 1, Instruction("REDUCE", 1, bucket=0), -1),
        r"REDUCE1/0 stands before its W1.5",
    ),
    "a bucket reduced twice": (lambda: twice(SPLIT, 1, "REDUCE1/1"), r"rank 1 does REDUCE1/1 twice"),
    "a bucket that is not there": (
        lambda: with_list(SPLIT, 1, [*SPLIT.lists[1], Instruction("REDUCE", 1, bucket=2)]),
        r"REDUCE1/2 .* has no place in the list of rank 1",
    ),
    "a head shard scored twice": (lambda: twice(FULL, 1, "HEAD_S6.2"), r"rank 1 does HEAD_S6.2 twice"),
    "a head shard not scored": (lambda: without(FULL, 1, "HEAD_S6.2"), r"rank 1 lacks HEAD_S6.2"),
    "a head combined before it is scored": (
        lambda: swapped(FULL, 1, "HEAD_S6.2", "HEAD_C6.2"),
        r"HEAD_C6.2 stands before its HEAD_S6.2",
    ),
    "head collectives in two orders": (
        lambda: swapped(swapped(FULL, 1, "HEAD_X6.2", "HEAD_X6.3"), 1, "HEAD_S6.2", "HEAD_S6.3"),
        r"rank 1 comes to HEAD_X6.3 where rank 0 comes to HEAD_X6.2",
    ),
    "a stage on another rank": (
        lambda: with_list(SPLIT, 0, [*SPLIT.lists[0], Instruction("F", 1, 0)]),
        r"F1.0 .* has no place in the list of rank 0",
    ),
    "a message to a stranger": (
        lambda: with_list(SPLIT, 0, [e._replace(peer=2) if e.op == "SEND_F" else e for e in SPLIT.lists[0]]),
        r"SEND_F0.0>2 .* has no place",
    ),
    "a send before its value": (
        lambda: swapped(SPLIT, 0, "F0.0", "SEND_F0.0>1"),
        r"SEND_F0.0>1 stands before its F0.0",
    ),
    "used before it was asked for": (
        lambda: before(SPLIT, 1, "F1.0", "RECV_F1.0<0"),
        r"F1.0 stands before its RECV_F1.0",
    ),
    "gradients out of order": (
        lambda: swapped(SPLIT, 0, "W0.4", "W0.5"),
        r"W0.5 comes where microbatch 4 is next",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_found(name: str) -> None:
    make, message = MUTANTS[name]
    mutant = make()
    assert mutant not in (FULL, SPLIT)
    assert not runs_right(mutant)
    with pytest.raises(ScheduleError, match=message) as caught:
        check(mutant)
    marks = re.findall(r">>(\S+)<<", str(caught.value))
    assert marks, "the grid marks no step"
    assert str(caught.value).count("\nrank ") == mutant.ranks


def test_a_deadlock_marks_where_each_rank_stands() -> None:
    """Each rank waits for the other: rank 0 for a gradient before it makes what the other is to do first."""
    good = make_schedule("1f1b", 2, 2)
    assert list(map(str, good.lists[1])) == ["F1.0", "B1.0", "F1.1", "B1.1"]
    bad = swapped(swapped(good, 0, "F0.1", "B0.0"), 1, "F1.1", "B1.0")
    assert not runs_right(bad)
    with pytest.raises(
        ScheduleError, match=r"rank 0 stands at B0.0, which waits for I1.0 on rank 1"
    ) as caught:
        check(bad)
    assert "ranks [0, 1] do not come to their end" in str(caught.value)
    assert re.findall(r">>(\S+)<<", str(caught.value)) == ["B0.0", "F1.1"]


def test_channels_that_hold_too_little_hang() -> None:
    """Turns of six microbatches on four ranks: two gradients are on their way before the first is asked for."""
    schedule = lower(make_schedule("interleaved", 4, 11))
    check(schedule)
    check(schedule, slots=2)
    with pytest.raises(ScheduleError, match=r"stands at SEND_I4.3>3, which waits for RECV_I3.2 on rank 3"):
        check(schedule, slots=1)
    with pytest.raises(ScheduleError, match="slots=0"):
        check(schedule, slots=0)


@given(schedules())
def test_generated_schedules_are_accepted(schedule: PipelineSchedule) -> None:
    check(schedule)
    assert runs_right(schedule)


@settings(max_examples=400)
@given(schedules(ranks=4, microbatches=5), st.data())
def test_checker_and_executor_agree_on_random_mutants(
    schedule: PipelineSchedule, data: st.DataObject
) -> None:
    """One or two instructions deleted, doubled, moved or swapped: neither accepts what the other does not."""
    for _ in range(data.draw(st.integers(1, 2))):
        rank = data.draw(st.integers(0, schedule.ranks - 1))
        entries = list(schedule.lists[rank])
        if not entries:
            continue
        first, second = (data.draw(st.integers(0, len(entries) - 1)) for _ in range(2))
        what = data.draw(st.sampled_from(("delete", "double", "swap", "swap with next", "move")))
        if what == "delete":
            entries.pop(first)
        elif what == "double":
            entries.insert(second, entries[first])
        elif what == "move":
            entries.insert(second, entries.pop(first))
        else:
            second = second if what == "swap" else min(first + 1, len(entries) - 1)
            entries[first], entries[second] = entries[second], entries[first]
        schedule = with_list(schedule, rank, entries)
    assert accepted(schedule) == runs_right(schedule)


def test_the_report_counts_buffers() -> None:
    """1F1B on 3 ranks: rank 0 receives nothing but gradients, the last nothing but activations."""
    report = check(lower(make_schedule("1f1b", 3, 6)))
    assert report.peak_activations == (3, 2, 1)
    assert report.peak_receives == (2, 2, 1)
    assert report.peak_hidden == (0, 0, 0)
    assert min(check(lower(make_schedule("1f1b+1", 3, 6), head=True)).peak_hidden) >= 1


def test_a_rank_that_holds_nothing_of_a_microbatch_is_marked_at_its_end() -> None:
    schedule = with_list(make_schedule("1f1b", 2, 1), 1, [])
    with pytest.raises(ScheduleError, match=r"rank 1 lacks F1.0 .3 instructions are missing.") as caught:
        check(schedule)
    assert ">>end<<" in str(caught.value)
