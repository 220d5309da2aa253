"""Generators: the bubbles and the memory that their papers promise, for any number of microbatches."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.pipeline.builders import papers
from train.errors import ConfigError
from train.pipeline import (
    SCHEDULES,
    Costs,
    PipelineSchedule,
    StageCost,
    check,
    make_schedule,
    simulate,
    split_head,
)

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 40))


def bubble(schedule: PipelineSchedule) -> Fraction:
    """With unit costs, exactly: all times are whole."""
    timeline = simulate(schedule)
    idle = sum(map(Fraction, timeline.idle))
    return idle / (Fraction(timeline.step_time) * schedule.ranks)


@given(SIZES)
def test_bubble_of_1f1b_and_gpipe(size: tuple[int, int]) -> None:
    p, m = size
    assert bubble(make_schedule("1f1b", p, m)) == Fraction(p - 1, m + p - 1)
    assert bubble(make_schedule("gpipe", p, m)) == Fraction(p - 1, m + p - 1)


@pytest.mark.parametrize(("microbatches", "percent"), [(8, 5.9), (16, 3.0), (32, 1.5)])
def test_bubble_of_zbv_on_four_ranks(microbatches: int, percent: float) -> None:
    value = bubble(make_schedule("zbv", 4, microbatches))
    assert value == Fraction(3, 6 * microbatches + 3)
    assert round(100 * float(value), 1) == percent


@given(SIZES)
def test_bubble_of_zero_bubble_schedules(size: tuple[int, int]) -> None:
    """ZB-H1: (p - 1)(F + I - W); ZBV and DualPipeV: (p - 1) of half a stage's units, once the pipeline is filled."""
    p, m = size
    if m >= p:
        assert bubble(make_schedule("zb-h1", p, m)) == Fraction(p - 1, 3 * m + p - 1)
    if m >= 2 * p - 1:
        assert bubble(make_schedule("zbv", p, m)) == Fraction(p - 1, 6 * m + p - 1)
    if m >= 2 * p:
        assert bubble(make_schedule("dualpipev", p, m)) == Fraction(p - 1, 6 * m + p - 1)


@given(SIZES, st.integers(1, 4))
def test_bubble_of_interleaved(size: tuple[int, int], chunks: int) -> None:
    """(p - 1)(F + B) / chunks, for every m >= p: multiples of p are nothing special."""
    p, m = size
    if m >= p:
        assert bubble(make_schedule("interleaved", p, m, chunks=chunks)) == Fraction(
            p - 1, chunks * m + p - 1
        )


@given(papers(ranks=9, microbatches=30))
def test_peak_activations_are_as_stated(schedule: PipelineSchedule) -> None:
    kind, p, m = SCHEDULES[schedule.name], schedule.ranks, schedule.microbatches
    chunks = schedule.stages // p
    stated = [kind.peak(rank, p, m, chunks) for rank in range(p)]
    held = check(schedule).peak_activations
    assert all(peak <= most for peak, most in zip(held, stated, strict=True))
    if m >= 2 * p or not kind.splits_backward:
        assert held == tuple(stated)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_peaks_in_units_of_1f1b(ranks: int) -> None:
    """Stages of a V are half as large: ZBV holds as much as 1F1B's first rank, DualPipeV half a stage more."""
    peaks = {
        name: max(check(make_schedule(name, ranks, 4 * ranks)).peak_activations)
        for name in ("gpipe", "1f1b", "1f1b+1", "zb-h1", "zbv", "dualpipev")
    }
    assert peaks == {
        "gpipe": 4 * ranks,
        "1f1b": ranks,
        "1f1b+1": ranks + 1,
        "zb-h1": ranks,
        "zbv": 2 * ranks,
        "dualpipev": 2 * ranks + 1,
    }


@pytest.mark.parametrize("name", SCHEDULES)
def test_facts_are_true(name: str) -> None:
    kind, schedule = SCHEDULES[name], make_schedule(name, 3, 9)
    ops = {entry.op for entries in schedule.lists for entry in entries}
    assert ops == ({"F", "B"} if not kind.splits_backward else ops | {"F", "I", "W"})
    assert schedule.placement == kind.placement(3, kind.chunks or 2)
    assert schedule.stages == 3 * (kind.chunks or 2)


def test_placements() -> None:
    assert make_schedule("interleaved", 3, 1, chunks=2).placement == (0, 1, 2, 0, 1, 2)
    assert make_schedule("zbv", 3, 1).placement == (0, 1, 2, 2, 1, 0)


def test_one_more_ahead_is_what_a_split_head_needs() -> None:
    """The barrier of the head costs 1F1B a quarter of the step; with one microbatch more in flight, nothing."""
    for name in ("1f1b", "interleaved"):
        idle = [bubble(split_head(make_schedule(f"{name}{ahead}", 4, 32))) for ahead in ("", "+1")]
        assert idle[1] < Fraction(3, 4) * idle[0]
        assert idle[1] < bubble(make_schedule(name, 4, 32)) * Fraction(3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zbw", 2, 2), "no schedule 'zbw'; there are gpipe, 1f1b"),
        (("1f1b", 0, 2), "both must be >= 1"),
        (("1f1b", 2, 0), "both must be >= 1"),
        (("zbv", 2, 2, 3), "2 stages per rank, not 3"),
        (("interleaved", 2, 2, 0), "one or more stages per rank, not 0"),
    ],
)
def test_what_is_not_there_is_refused(arguments: tuple[str, int, int, int | None], message: str) -> None:
    name, ranks, microbatches, *chunks = arguments
    with pytest.raises(ConfigError, match=message):
        make_schedule(name, ranks, microbatches, chunks=chunks[0] if chunks else None)


def test_equal_arguments_give_equal_schedules() -> None:
    assert make_schedule("zbv", 4, 7).digest == make_schedule("zbv", 4, 7).digest


def test_uneven_stages_show_in_the_bubble() -> None:
    """A stage of twice the work makes the others wait."""
    schedule = make_schedule("1f1b", 2, 8)
    small = StageCost(forward=1.0, input_grad=1.0, weight_grad=1.0)
    large = StageCost(forward=2.0, input_grad=2.0, weight_grad=2.0)
    timeline = simulate(schedule, Costs(stages=(small, large)))
    assert timeline.bubble > simulate(schedule).bubble
    assert timeline.work == (24.0, 48.0)
