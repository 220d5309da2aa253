"""Lowering: sends and receives where transfers overlap, nothing between stages of one rank, buckets last, the head."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.pipeline.builders import costs_for, papers, with_list
from train.errors import ScheduleError
from train.pipeline import (
    Costs,
    HeadCost,
    Instruction,
    PipelineSchedule,
    add_communication,
    add_reduce,
    check,
    lower,
    make_schedule,
    simulate,
    split_head,
)
from train.pipeline.instructions import COMPUTE, HEAD, RECEIVE, SEND


def texts(schedule: PipelineSchedule, rank: int) -> str:
    return " ".join(map(str, schedule.lists[rank]))


def test_1f1b_lowered() -> None:
    schedule = add_communication(make_schedule("1f1b", 2, 2))
    assert texts(schedule, 0) == "F0.0 SEND_F0.0>1 RECV_I0.0<1 F0.1 SEND_F0.1>1 RECV_I0.1<1 B0.0 B0.1"
    assert texts(schedule, 1) == "RECV_F1.0<0 F1.0 RECV_F1.1<0 B1.0 SEND_I1.0>0 F1.1 B1.1 SEND_I1.1>0"


def test_nothing_is_sent_at_the_turn_of_a_v() -> None:
    schedule = add_communication(make_schedule("zbv", 2, 1))
    assert texts(schedule, 1) == (
        "RECV_F1.0<0 F1.0 RECV_I2.0<0 F2.0 SEND_F2.0>0 I2.0 W2.0 I1.0 SEND_I1.0>0 W1.0"
    )
    alone = add_communication(make_schedule("zbv", 1, 3))
    assert alone.lists == make_schedule("zbv", 1, 3).lists


@given(papers(), st.integers(0, 3))
def test_communication_overlaps_computation(schedule: PipelineSchedule, ahead: int) -> None:
    """A send directly follows what makes its value; a receive has ``ahead`` computations to arrive."""
    lowered = add_communication(schedule, ahead=ahead)
    check(lowered)
    for old, entries in zip(schedule.lists, lowered.lists, strict=True):
        assert tuple(entry for entry in entries if entry.op in COMPUTE) == old
        computed: list[Instruction] = []
        for place, entry in enumerate(entries):
            if entry.op in SEND:
                maker = entries[place - 1]
                assert (maker.stage, maker.microbatch) == (entry.stage, entry.microbatch)
                assert maker.op in ("F" if entry.op == "SEND_F" else "IB")
            elif entry.op in RECEIVE:
                ops = "F" if entry.op == "RECV_F" else "IB"
                uses = [
                    e.op in ops and (e.stage, e.microbatch) == (entry.stage, entry.microbatch) for e in old
                ]
                assert len(computed) <= max(0, uses.index(True) - ahead)
            elif entry.op in COMPUTE:
                computed.append(entry)


def test_a_bucket_is_reduced_right_after_its_stage_is_done() -> None:
    schedule = lower(make_schedule("zbv", 2, 4), buckets=[1, 2, 0, 1])
    assert texts(schedule, 1).endswith("W2.3 W1.3 REDUCE1/0 REDUCE1/1")
    assert "W3.3 REDUCE3/0 I0.2 RECV_I0.3<1 W0.2 I0.3 W0.3 REDUCE0/0" in texts(schedule, 0)
    later = lower(make_schedule("1f1b", 3, 4), buckets=1)
    assert texts(later, 2).endswith("B2.3 SEND_I2.3>1 REDUCE2/0")


@given(papers(), st.integers(1, 3))
def test_passes_commute(schedule: PipelineSchedule, buckets: int) -> None:
    assert add_communication(add_reduce(schedule, buckets)) == add_reduce(
        add_communication(schedule), buckets
    )


@given(papers(ranks=5, microbatches=9), st.data())
def test_a_split_head_leaves_the_rest_as_it_was(schedule: PipelineSchedule, data: st.DataObject) -> None:
    """For any costs of the stages, the lists run; every rank has every step of each microbatch once, in order."""
    split = split_head(schedule, data.draw(costs_for(schedule)))
    check(split)
    root = schedule.placement[schedule.last]
    for rank, (old, entries) in enumerate(zip(schedule.lists, split.lists, strict=True)):
        assert tuple(entry for entry in entries if entry.op not in HEAD) == old
        for op in HEAD:
            numbers = [entry.microbatch for entry in entries if entry.op == op]
            assert numbers == list(range(schedule.microbatches)), op
        if rank == root:
            for place, entry in enumerate(entries):
                if entry.op == "HEAD_X":
                    assert entries[place - 1] == Instruction("F", schedule.last, entry.microbatch)


def test_a_head_of_one_rank_is_split_too() -> None:
    assert (
        texts(split_head(make_schedule("1f1b", 1, 1)), 0)
        == "F0.0 HEAD_X1.0 HEAD_S1.0 HEAD_C1.0 B0.0 HEAD_T1.0"
    )


@pytest.mark.parametrize(
    ("name", "head"), [("1f1b+1", 0.5), ("interleaved+1", 0.5), ("zbv", 0.5), ("zbv", 1.0)]
)
def test_a_split_head_takes_less_time_than_a_whole_one(name: str, head: float) -> None:
    """As much work in all: on the last stage it makes three ranks wait, split it does not."""
    schedule = make_schedule(name, 4, 32)
    unit = Costs.unit(schedule)
    last = replace(unit.stages[-1], forward=1 + 4 * head, weight_grad=1 + 4 * head)
    whole = simulate(schedule, replace(unit, stages=(*unit.stages[:-1], last)))
    shards = (HeadCost(score=head, weight_grad=head),) * 4
    split = simulate(lower(schedule, head=True), replace(unit, heads=shards))
    assert sum(split.work) == sum(whole.work)
    assert split.step_time < 0.9 * whole.step_time
    assert split.bubble < 1.5 * simulate(schedule).bubble


@pytest.mark.parametrize(("name", "percent"), [("1f1b", 24), ("1f1b+1", 7.5), ("zbv", 1.4)])
def test_bubbles_of_a_split_head_are_as_documented(name: str, percent: float) -> None:
    """docs/architecture.md: four ranks, 32 microbatches, a head of 0.45 forwards per rank."""
    lowered = lower(make_schedule(name, 4, 32), head=True)
    costs = replace(Costs.unit(lowered), heads=(HeadCost(score=0.3, weight_grad=0.15),) * 4)
    digits = 0 if percent == 24 else 1
    assert round(100 * simulate(lowered, costs).bubble, digits) == percent


def test_passes_refuse_what_they_cannot_lower() -> None:
    schedule = make_schedule("1f1b", 2, 2)
    lowered = lower(schedule, buckets=1)
    with pytest.raises(ScheduleError, match="communicates already"):
        add_communication(lowered)
    with pytest.raises(ScheduleError, match="reduces already"):
        add_reduce(lowered, 1)
    with pytest.raises(ScheduleError, match="split_head comes first"):
        split_head(lowered)
    with pytest.raises(ScheduleError, match="split already"):
        split_head(split_head(schedule))
    for buckets in ([1], [1, -1], -1):
        with pytest.raises(ScheduleError, match="give 2 counts >= 0"):
            add_reduce(schedule, buckets)
    with pytest.raises(ScheduleError, match=r"rank 1 lacks I1.0: check the lists first"):
        add_communication(with_list(schedule, 1, []))
    with pytest.raises(ScheduleError, match="ahead=-1"):
        add_communication(schedule, ahead=-1)
    reverse = PipelineSchedule.parse(
        schedule.text.replace(".0", ".x").replace(".1", ".0").replace(".x", ".1")
    )
    with pytest.raises(ScheduleError, match="all microbatches, in order"):
        split_head(reverse)
    free = replace(Costs.unit(schedule).stages[0], weight_grad=0.0)
    with pytest.raises(ScheduleError, match="must take some"):
        split_head(schedule, Costs(stages=(free, free)))
