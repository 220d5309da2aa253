"""Schedules to test with: any kind, ranks and microbatches, lowered or not, with uneven buckets and costs."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from train.pipeline import (
    SCHEDULES,
    Costs,
    HeadCost,
    Instruction,
    PipelineSchedule,
    StageCost,
    lower,
    make_schedule,
)

__all__ = ["before", "costs_for", "moved", "papers", "schedules", "swapped", "twice", "with_list", "without"]


def with_list(schedule: PipelineSchedule, rank: int, entries: list[Instruction]) -> PipelineSchedule:
    """With another list on one rank."""
    lists = list(schedule.lists)
    lists[rank] = tuple(entries)
    return replace(schedule, lists=tuple(lists))


def moved(schedule: PipelineSchedule, rank: int, entry: Instruction, by: int) -> PipelineSchedule:
    """With one instruction that many places further on (or further up, if negative)."""
    entries = list(schedule.lists[rank])
    place = entries.index(entry)
    entries.insert(place + by, entries.pop(place))
    return with_list(schedule, rank, entries)


def without(schedule: PipelineSchedule, rank: int, text: str) -> PipelineSchedule:
    return with_list(schedule, rank, [entry for entry in schedule.lists[rank] if str(entry) != text])


def swapped(schedule: PipelineSchedule, rank: int, first: str, second: str) -> PipelineSchedule:
    other = {first: Instruction.parse(second), second: Instruction.parse(first)}
    return with_list(schedule, rank, [other.get(str(entry), entry) for entry in schedule.lists[rank]])


def twice(schedule: PipelineSchedule, rank: int, text: str) -> PipelineSchedule:
    again = Instruction.parse(text)
    return with_list(
        schedule, rank, [e for entry in schedule.lists[rank] for e in [entry] * (1 + (entry == again))]
    )


def before(schedule: PipelineSchedule, rank: int, text: str, other: str) -> PipelineSchedule:
    """Moves ``text`` to right before ``other``."""
    names = list(map(str, schedule.lists[rank]))
    here, there = names.index(text), names.index(other)
    return moved(schedule, rank, Instruction.parse(text), there - here - (there > here))


@st.composite
def papers(draw: st.DrawFn, ranks: int = 6, microbatches: int = 14) -> PipelineSchedule:
    """As generators write them."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    chunks = draw(st.integers(1, 3)) if SCHEDULES[name].chunks is None else None
    return make_schedule(name, draw(st.integers(1, ranks)), draw(st.integers(1, microbatches)), chunks=chunks)


@st.composite
def costs_for(draw: st.DrawFn, schedule: PipelineSchedule) -> Costs:
    """Uneven, in whole numbers of a 64th: sums are exact."""
    time = st.integers(1, 200).map(lambda number: number / 64)
    stages = tuple(
        StageCost(
            forward=draw(time),
            input_grad=draw(time),
            weight_grad=draw(time),
            backward=draw(st.none() | time),
            nbytes=draw(st.integers(0, 1000)),
            reduce=tuple(draw(time) for _ in range(schedule.buckets[stage] if schedule.buckets else 0)),
        )
        for stage in range(schedule.stages)
    )
    heads = tuple(
        HeadCost(score=draw(time), weight_grad=draw(time), hidden_nbytes=500, statistics_nbytes=7)
        for _ in range(schedule.ranks if schedule.split_head else 0)
    )
    return Costs(stages=stages, heads=heads)


@st.composite
def schedules(draw: st.DrawFn, ranks: int = 5, microbatches: int = 9) -> PipelineSchedule:
    """Lowered in any way, or not."""
    schedule = draw(papers(ranks, microbatches))
    if draw(st.booleans()):
        return schedule
    head = draw(st.booleans())
    stages = schedule.stages + head
    buckets = draw(st.just(0) | st.lists(st.integers(0, 3), min_size=stages, max_size=stages))
    return lower(schedule, head=head, buckets=buckets, costs=draw(costs_for(schedule)) if head else None)
