"""The simulator: bounds that no schedule can beat, links that cost what they cost, idle time that adds up."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcomm.topology import Link, Topology
from tests.train.pipeline.builders import costs_for, papers, schedules
from train.errors import ScheduleError
from train.pipeline import (
    Costs,
    HeadCost,
    PipelineSchedule,
    StageCost,
    Timeline,
    lower,
    make_schedule,
    simulate,
)
from train.pipeline.instructions import COMPUTE, Instruction

FREE = Link(alpha=0.0, beta=0.0)


def critical_path(schedule: PipelineSchedule, costs: Costs) -> float:
    """One microbatch alone: forward through all stages and back, and the shortest of the last stage's weights."""
    forward = sum(stage.forward for stage in costs.stages)
    backward = sum(min(stage.input_grad, stage.seconds("B")) for stage in costs.stages)
    head = max((head.score for head in costs.heads), default=0.0)
    return forward + head + backward


def links(nodes: int, ranks: int, alpha: float = 0.25, beta: float = 0.125) -> Topology:
    return replace(
        Topology.even(nodes, ranks),
        intra_node=Link(alpha=alpha / 8, beta=beta / 8),
        inter_node=Link(alpha=alpha, beta=beta),
    )


@given(schedules(), st.data())
def test_no_step_is_shorter_than_its_bounds(schedule: PipelineSchedule, data: st.DataObject) -> None:
    costs = data.draw(costs_for(schedule))
    timeline = simulate(schedule, costs)
    work = [
        sum(costs.seconds(entry, rank) for entry in entries if entry.op not in _QUIET)
        for rank, entries in enumerate(schedule.lists)
    ]
    assert timeline.work == tuple(work)
    assert timeline.step_time >= max(work)
    assert timeline.step_time >= critical_path(schedule, costs)
    assert timeline.step_time <= sum(work) + sum(sum(stage.reduce) for stage in costs.stages)
    assert timeline == simulate(schedule, costs)
    assert sum(timeline.idle_by_stage) <= sum(timeline.idle)
    assert timeline.exposed_communication == (0.0,) * schedule.ranks


_QUIET = ("SEND_F", "SEND_I", "RECV_F", "RECV_I", "REDUCE", "HEAD_X", "HEAD_C")


@given(papers(), st.data())
def test_computation_alone_takes_the_times_of_the_core(
    schedule: PipelineSchedule, data: st.DataObject
) -> None:
    """Lists without messages are played in a loop, those with them as events: messages that take no time cost none."""
    costs = data.draw(costs_for(schedule))
    alone, events = simulate(schedule, costs), simulate(lower(schedule), costs)
    for rank, entries in enumerate(events.schedule.lists):
        for mine, its in (
            (alone.start, events.start),
            (alone.finish, events.finish),
            (alone.made, events.made),
        ):
            computed = [time for entry, time in zip(entries, its[rank], strict=True) if entry.op in COMPUTE]
            assert mine[rank] == tuple(computed)


@given(schedules(), st.data())
def test_links_only_cost(schedule: PipelineSchedule, data: st.DataObject) -> None:
    """Free links change nothing; others make no step shorter, and what they add is said to be exposed."""
    if not schedule.communicates:
        return
    costs = data.draw(costs_for(schedule))
    nodes = data.draw(st.integers(1, schedule.ranks))
    bare = simulate(schedule, costs)
    assert simulate(schedule, costs, links(nodes, schedule.ranks, 0.0, 0.0)).step_time == bare.step_time
    for beta in (0.0, 1 / 1024, 1 / 64):
        way = links(nodes, schedule.ranks, 0.25, beta)
        slow, eager = (simulate(schedule, costs, way, rendezvous=rendezvous) for rendezvous in (True, False))
        assert slow.work == bare.work
        assert slow.step_time >= bare.step_time
        if slow.step_time > bare.step_time:
            assert max(slow.exposed_communication) > 0
        if beta == 0:  # else an earlier message may take the link from one that is waited for
            assert eager.step_time <= slow.step_time


def test_a_message_takes_alpha_and_beta_and_no_rank() -> None:
    """Two stages, one microbatch: the step is the path, transfers included; the ranks work as before."""
    schedule = lower(make_schedule("1f1b", 2, 1))
    stage = StageCost(forward=1.0, input_grad=1.0, weight_grad=1.0, nbytes=16)
    timeline = simulate(schedule, Costs(stages=(stage, stage)), links(2, 2))
    hop = 0.25 + 16 * 0.125
    assert timeline.step_time == 2 * (1.0 + 2.0) + 2 * hop
    assert timeline.work == (3.0, 3.0)
    assert timeline.exposed_communication == (hop, hop)
    near = simulate(schedule, Costs(stages=(stage, stage)), links(1, 2))
    assert near.step_time == 6.0 + 2 * hop / 8


def test_transfers_hide_behind_computation() -> None:
    """A transfer of one unit costs 1F1B's steady phase nothing but the way there and back once per warmup."""
    stage = StageCost(forward=1.0, input_grad=1.0, weight_grad=1.0, nbytes=8)
    schedule = make_schedule("zbv", 2, 16)
    costs = Costs(stages=(stage,) * 4)
    slow = simulate(lower(schedule), costs, links(2, 2, alpha=0.0))  # each message takes a whole forward
    alone = 16 * 3 * 2 * 1.0  # seconds of messages, were they not hidden
    assert (
        simulate(schedule, costs).step_time < slow.step_time < simulate(schedule, costs).step_time + alone / 3
    )


def test_asking_late_costs_with_rendezvous_only() -> None:
    """A receive that stands right before its use has no computation to hide behind."""
    from train.pipeline import add_communication

    stage = StageCost(forward=1.0, input_grad=1.0, weight_grad=1.0, nbytes=4)
    costs = Costs(stages=(stage,) * 2)
    schedule, way = make_schedule("1f1b", 2, 12), links(2, 2)
    late, early = (add_communication(schedule, ahead=ahead) for ahead in (0, 1))
    assert simulate(early, costs, way).step_time < simulate(late, costs, way).step_time
    same = [simulate(lowered, costs, way, rendezvous=False).step_time for lowered in (late, early)]
    assert same[0] == same[1] <= simulate(early, costs, way).step_time


def test_buckets_overlap_the_cooldown() -> None:
    """The last rank is done first and reduces while the others go on; what the first rank reduces is exposed."""
    stage = StageCost(forward=1.0, input_grad=1.0, weight_grad=1.0, reduce=(1.0, 1.0))
    schedule = lower(make_schedule("1f1b", 4, 8), buckets=2)
    timeline = simulate(schedule, Costs(stages=(stage,) * 4))
    bare = simulate(make_schedule("1f1b", 4, 8))
    assert timeline.exposed_reduce == 2.0
    assert timeline.step_time == bare.step_time + 2.0
    only_last = (replace(stage, reduce=(0.0, 0.0)),) * 3 + (replace(stage, reduce=(3.0, 3.0)),)
    assert simulate(schedule, Costs(stages=only_last)).exposed_reduce == 0.0


@pytest.mark.parametrize("microbatches", [1, 3])
def test_buckets_go_inside_the_last_backward(microbatches: int) -> None:
    """B takes two seconds; its first bucket is complete in the middle and summed in three; the second waits for it."""
    schedule = lower(make_schedule("1f1b", 1, microbatches), buckets=2)
    stage = StageCost(forward=1.0, input_grad=1.0, weight_grad=1.0, reduce=(3.0, 1.0))
    inside = simulate(schedule, Costs(stages=(replace(stage, ready=(0.5, 1.0)),)))
    behind = simulate(schedule, Costs(stages=(stage,)))
    assert behind.step_time == 3.0 * microbatches + 4.0
    assert inside.step_time == behind.step_time - 1.0
    assert inside.work == behind.work == (3.0 * microbatches,)


def test_a_bucket_put_further_down_waits_until_there() -> None:
    """One rank with two stages: F0 F1 I1 W1 I0 W0. The second bucket is complete in the middle of W1, at 3.5."""
    schedule = lower(make_schedule("zbv", 1, 1), buckets=1)
    entries = [entry for entry in schedule.lists[0] if entry.op != "REDUCE"]
    first, second = (Instruction("REDUCE", stage, bucket=0) for stage in (0, 1))
    cost = StageCost(forward=1.0, input_grad=1.0, weight_grad=1.0, reduce=(4.0,), ready=(0.5,))
    costs = Costs(stages=(replace(cost, reduce=(0.0,)), cost))
    for place, begin in ((4, 3.5), (5, 5.0), (6, 6.0)):
        moved = replace(schedule, lists=((*entries[:place], second, *entries[place:], first),))
        timeline = simulate(moved, costs)
        assert timeline.start[0][place] == begin
        assert timeline.step_time == begin + 4.0


def test_the_head_costs_two_hops_and_a_broadcast() -> None:
    """One microbatch: hidden states out, statistics and gradient in; the far shard's weights wait for statistics."""
    schedule = lower(make_schedule("1f1b", 2, 1), head=True)
    stage = StageCost(forward=1.0, input_grad=1.0, weight_grad=1.0)
    head = HeadCost(score=2.0, weight_grad=0.5, hidden_nbytes=8, statistics_nbytes=4)
    timeline = simulate(schedule, Costs(stages=(stage, stage), heads=(head, head)), links(2, 2))
    alpha, beta = 0.25, 0.125
    to_root = 1.0 + alpha + 1.0 + (alpha + 8 * beta) + 2.0 + (alpha + 12 * beta)
    ends = dict(zip(map(str, schedule.lists[1]), timeline.start[1], strict=True))
    assert ends["B1.0"] == to_root
    begins = dict(zip(map(str, schedule.lists[0]), timeline.start[0], strict=True))
    assert begins["B0.0"] == to_root + 2.0 + alpha
    assert begins["HEAD_T2.0"] == to_root + 2.0 + alpha + 2.0


def test_idle_time_adds_up() -> None:
    """Rank 0 of 1F1B waits for gradients: its idle time is its stage's, and behind its last there is none."""
    timeline = simulate(make_schedule("1f1b", 3, 4))
    assert timeline.idle == (6.0, 6.0, 6.0)
    assert timeline.idle_by_stage == (6.0, 4.0, 2.0)  # the others' rest is at the end
    assert timeline.bubble == pytest.approx(1 / 3)


def test_sizes_of_microbatches_scale_times() -> None:
    schedule = make_schedule("1f1b", 2, 3)
    costs = replace(Costs.unit(schedule), sizes=(1.0, 1.0, 0.5))
    assert simulate(schedule, costs).work == (7.5, 7.5)


def test_the_grid() -> None:
    timeline = simulate(make_schedule("1f1b", 2, 2))
    assert timeline.grid() == "rank  0 | F0 F1 .  .  B0 -  .  B1 -\nrank  1 | .  F0 B0 -  F1 B1 -  .  ."
    entry = timeline.schedule.lists[1][1]
    assert timeline.grid([(1, entry)]).splitlines()[1] == "rank  1 | .   F0  *B0 -   F1  B1  -   .   ."
    folded = simulate(make_schedule("zbv", 2, 1)).grid()
    assert folded.splitlines()[0] == "rank  0 | F0  .   .   F0' I0' W0' .   .   I0  W0"
    with pytest.raises(ScheduleError, match="a grid needs unit costs"):
        simulate(timeline.schedule, _all(0.5, timeline)).grid()


def _all(seconds: float, timeline: Timeline) -> Costs:
    stage = StageCost(forward=seconds, input_grad=seconds, weight_grad=seconds)
    return Costs(stages=(stage,) * timeline.schedule.stages)


def test_bubbles_are_exact_fractions() -> None:
    """Halves and quarters of seconds are exact, so nothing is lost to rounding."""
    schedule = make_schedule("zbv", 4, 8)
    timeline = simulate(schedule, _all(0.25, simulate(schedule)))
    assert Fraction(timeline.step_time) == Fraction(51, 4)


def test_figures_for_another_schedule_are_refused() -> None:
    paper, lowered = make_schedule("1f1b", 2, 2), lower(make_schedule("1f1b", 2, 2), buckets=1)
    unit = Costs.unit(paper)
    for costs, message in (
        (replace(unit, stages=unit.stages[:1]), "costs of 1 stages"),
        (replace(unit, heads=(HeadCost(score=1.0, weight_grad=1.0),) * 2), "2 shards of the head"),
        (replace(unit, sizes=(1.0,)), "1 sizes for 2 microbatches"),
        (replace(unit, stages=(replace(unit.stages[0], forward=-1.0),) * 2), "finite numbers >= 0"),
        (replace(unit, stages=(replace(unit.stages[0], reduce=(1.0, 1.0)),) * 2), "2 sums for 1 buckets"),
        (replace(unit, stages=(replace(unit.stages[0], ready=(0.5, 1.0)),) * 2), "each of 1 buckets"),
        (replace(unit, stages=(replace(unit.stages[0], ready=(1.5,)),) * 2), "each of 1 buckets"),
    ):
        with pytest.raises(ScheduleError, match=message):
            simulate(lowered if "buckets" in message else paper, costs)
    with pytest.raises(ScheduleError, match="add_communication first"):
        simulate(paper, unit, links(1, 2))
    with pytest.raises(ScheduleError, match="links of 3 ranks"):
        simulate(lowered, unit, links(1, 3))
    with pytest.raises(ScheduleError, match="inter_node was not measured"):
        simulate(lowered, unit, Topology.even(2, 2))
