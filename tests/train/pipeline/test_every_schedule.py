"""Every schedule of up to 16 ranks and 64 microbatches is correct, none left out.

All kinds, with two and three stages per rank where that may be chosen; any number of microbatches, so turns are uneven.
Each is lowered with uneven buckets: with channels that hold as few messages as the kind needs; with a split head that
even stages order; and, up to two turns of 16 microbatches, with one that uneven stages order. That covers it

- as written: a lowered list computes what the written one does, in its order, and then its run is one of that, since a
  message makes nobody wait for less. Whatever counts computation alone, like peak activations, is alike;
- with channels that hold more: a run in which sends wait is one in which they need not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from tests.train.pipeline.builders import before, moved, swapped, twice, without
from train.errors import ScheduleError
from train.pipeline import (
    SCHEDULES,
    Costs,
    Instruction,
    PipelineSchedule,
    StageCost,
    check,
    lower,
    make_schedule,
)
from train.pipeline.lines import OP, Numbers

RANKS, MICROBATCHES, CHUNKS = 16, 64, (2, 3)
UNEVEN = 32
"""Microbatches up to which uneven stages order a split head, too."""
SHARE = 4800
"""Microbatches on ranks, about, that one test checks."""

Lower = Callable[..., PipelineSchedule]


def shares() -> Iterator[tuple[int, range]]:
    """(ranks, numbers of microbatches) that take about the same time; together all."""
    for ranks in range(1, RANKS + 1):
        parts = -(-ranks * sum(range(MICROBATCHES + 1)) // SHARE)
        ends = [
            round(MICROBATCHES * (part / parts) ** 0.5) for part in range(parts + 1)
        ]  # large ones take longer
        yield from ((ranks, range(ends[part] + 1, ends[part + 1] + 1)) for part in range(parts))


def written(ranks: int, microbatches: int) -> Iterator[PipelineSchedule]:
    """Of all kinds."""
    for name, kind in SCHEDULES.items():
        for chunks in CHUNKS if kind.chunks is None else (None,):
            yield make_schedule(name, ranks, microbatches, chunks=chunks)


def uneven(schedule: PipelineSchedule) -> Costs:
    """Stages of which no two neighbours take the same time."""
    return Costs(
        stages=tuple(
            StageCost(forward=1 + stage % 3, input_grad=2 - stage % 2, weight_grad=0.5 + stage % 4)
            for stage in range(schedule.stages)
        )
    )


def least_slots(schedule: PipelineSchedule) -> int:
    """Messages that a channel must hold: one, and for interleaved turns longer than p what is ahead of its use."""
    if "interleaved" not in schedule.name:
        return 1
    turns = max(1, schedule.microbatches // schedule.ranks)
    return max(1, -(-schedule.microbatches // turns) - schedule.ranks)


def computation(schedule: PipelineSchedule) -> Numbers:
    """Rank, op, stage and microbatch of F, I, W and B, in the order of the lists."""
    table = schedule.table
    here = np.flatnonzero(table.op <= OP["B"])
    stage = table.lines.unit[table.line[here]]
    return np.stack((table.rank[here], table.op[here], stage, table.microbatch[here]))


def check_lowered(
    schedule: PipelineSchedule, lowering: Lower, *, head: bool, costs: Costs | None = None
) -> None:
    buckets = [(stage + schedule.microbatches) % 3 for stage in range(schedule.stages + head)]
    lowered = lowering(schedule, head=head, buckets=buckets, costs=costs)
    report = check(lowered, slots=None if head else least_slots(schedule))
    kind, chunks = SCHEDULES[schedule.name], schedule.stages // schedule.ranks
    for rank, peak in enumerate(report.peak_activations):
        most = kind.peak(rank, schedule.ranks, schedule.microbatches, chunks)
        assert peak <= most, f"{schedule.name}: rank {rank} holds {peak} activations, not {most}"
    assert np.array_equal(computation(lowered), computation(schedule)), "lowered, it computes something else"


def check_sizes(ranks: int, numbers: Iterable[int], lowering: Lower = lower) -> int:
    """All schedules of so many ranks and microbatches; how many."""
    count = 0
    for microbatches in numbers:
        for schedule in written(ranks, microbatches):
            check_lowered(schedule, lowering, head=False)
            check_lowered(schedule, lowering, head=True)
            if microbatches <= UNEVEN:
                check_lowered(schedule, lowering, head=True, costs=uneven(schedule))
            count += 1
    return count


@pytest.mark.parametrize(
    ("ranks", "numbers"), [pytest.param(p, m, id=f"{p}-{m.start}..{m.stop - 1}") for p, m in shares()]
)
def test_every_schedule(ranks: int, numbers: range) -> None:
    assert check_sizes(ranks, numbers) == 10 * len(numbers)


PLANTED: dict[str, tuple[bool, Callable[[PipelineSchedule], PipelineSchedule], str]] = {
    "a dropped receive": (False, lambda s: without(s, 1, "RECV_F1.3<0"), "rank 1 lacks RECV_F1.3<0"),
    "swapped sends": (
        False,
        lambda s: before(s, 0, "SEND_F0.3>1", "F0.5"),
        "rank 0 sends SEND_F0.4>1 where rank 1 receives RECV_F1.3<0",
    ),
    "a W before its I": (
        False,
        lambda s: swapped(s, 0, "I0.6", "W0.6"),
        "W0.6 stands before its I0.6 on rank 0",
    ),
    "a microbatch twice": (False, lambda s: twice(s, 1, "W1.3"), "rank 1 does W1.3 twice"),
    "a bucket one op early": (
        False,
        lambda s: moved(s, 1, Instruction("REDUCE", 1, bucket=0), -1),
        "REDUCE1/0 stands before its W1.6",
    ),
    "a receive asked for late": (False, lambda s: before(s, 1, "F1.3", "RECV_F1.3<0"), "F1.3 stands before"),
    "a head shard twice": (True, lambda s: twice(s, 1, "HEAD_S3.2"), "rank 1 does HEAD_S3.2 twice"),
    "a head combined too early": (
        True,
        lambda s: swapped(s, 1, "HEAD_S3.2", "HEAD_C3.2"),
        "HEAD_C3.2 stands before its HEAD_S3.2",
    ),
}
"""What is wrong -> (in lists with a split head, how it is planted in ZB-H1 of three ranks, what the checker says)."""


def planting(
    bug: Callable[[PipelineSchedule], PipelineSchedule], *, head: bool, in_costs: bool = False
) -> Lower:
    def lowering(schedule: PipelineSchedule, **options: object) -> PipelineSchedule:
        lowered = lower(schedule, **options)  # type: ignore[arg-type]
        right = (schedule.name, lowered.split_head, options["costs"] is not None) == ("zb-h1", head, in_costs)
        return bug(lowered) if right else lowered

    return lowering


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str) -> None:
    """Also where only uneven stages show it."""
    head, bug, message = PLANTED[name]
    for in_costs in (False, True) if head else (False,):
        with pytest.raises(ScheduleError, match=f"zb-h1: .*{message}") as caught:
            check_sizes(3, [7], planting(bug, head=head, in_costs=in_costs))
        assert ">>" in str(caught.value)


def test_too_few_slots_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "least_slots", lambda schedule: 1)
    with pytest.raises(ScheduleError, match=r"interleaved: deadlock: rank . stands at SEND_I"):
        check_sizes(4, [11])


def test_another_order_of_computation_is_found() -> None:
    """A W that stands one I further up: correct, and holds no more."""

    def bug(schedule: PipelineSchedule) -> PipelineSchedule:
        other = before(schedule, 1, "W1.5", "I1.6")
        assert check(other) == check(schedule)
        return other

    with pytest.raises(AssertionError, match="computes something else"):
        check_sizes(3, [7], planting(bug, head=False))


def test_a_peak_that_is_too_high_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = SCHEDULES["1f1b"]
    monkeypatch.setitem(
        SCHEDULES, "1f1b", replace(kind, peak=lambda rank, p, m, chunks: kind.peak(rank, p, m, chunks) - 1)
    )
    with pytest.raises(AssertionError, match="1f1b: rank 0 holds 3 activations, not 2"):
        check_sizes(3, [7])


def test_shares_leave_nothing_out() -> None:
    sizes = [(ranks, number) for ranks, numbers in shares() for number in numbers]
    assert sorted(sizes) == [(p, m) for p in range(1, RANKS + 1) for m in range(1, MICROBATCHES + 1)]
    assert len(sizes) == len(set(sizes))
