"""The discrete-event core: by hand, and by its laws."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcomm.errors import PlanError
from hybridcomm.simulate import Tasks


def test_dependencies_resources_streams_and_latency_by_hand() -> None:
    tasks = Tasks()
    a = tasks.add(2.0, resources=("cpu",))
    b = tasks.add(1.0, resources=("cpu",))  # waits for the processor, not for a
    c = tasks.add(1.0, latency=5.0, resources=("link",), stream="s", after=(a,))
    d = tasks.add(1.0, resources=("link",), stream="s")  # behind c, though it could go at once
    e = tasks.add(1.0, after=(c,))
    schedule = tasks.schedule()
    assert schedule.start == (0, 2, 2, 3, 8)  # d: when c has left the link; e: when c has arrived
    assert schedule.finish == (2, 3, 8, 4, 9)
    assert schedule.makespan == 9
    assert (a, b, c, d, e) == (0, 1, 2, 3, 4)


def test_a_task_of_two_resources_waits_for_both_and_blocks_neither() -> None:
    tasks = Tasks()
    tasks.add(3.0, resources=("out",))
    tasks.add(2.0, resources=("in",))
    both = tasks.add(1.0, resources=("in", "out"))
    later = tasks.add(0.5, resources=("in",))  # the way in stands idle from 2 to 3
    schedule = tasks.schedule()
    assert schedule.start[both] == 3
    assert schedule.start[later] == 2


def test_of_those_that_wait_the_first_that_was_ready_goes_first() -> None:
    tasks = Tasks()
    tasks.add(4.0, resources=("cpu",))
    late = tasks.add(2.0)
    second = tasks.add(1.0, resources=("cpu",), after=(late,))  # ready at 2
    early = tasks.add(1.0)
    first = tasks.add(1.0, resources=("cpu",), after=(early,))  # ready at 1
    schedule = tasks.schedule()
    assert (schedule.start[first], schedule.start[second]) == (4, 5)


@pytest.mark.parametrize(
    "bad", [{"duration": -1}, {"duration": 1, "latency": -1}, {"duration": 1, "after": (0,)}]
)
def test_impossible_tasks_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(PlanError):
        Tasks().add(**bad)  # type: ignore[arg-type]


_TASK = st.tuples(
    st.integers(0, 9), st.integers(0, 3), st.sets(st.sampled_from("abc")), st.sampled_from("xyz-"), st.data()
)


@given(st.lists(_TASK, max_size=25))
def test_schedules_keep_every_promise(rows: list[tuple[int, int, set[str], str, st.DataObject]]) -> None:
    tasks, afters = Tasks(), []
    for number, (duration, latency, resources, stream, data) in enumerate(rows):
        after = data.draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        afters.append(after)
        tasks.add(
            duration,
            latency=latency,
            resources=tuple(sorted(resources)),
            stream=None if stream == "-" else stream,
            after=after,
        )
    schedule = tasks.schedule()
    assert schedule == tasks.schedule()
    ends = [start + row[0] for start, row in zip(schedule.start, rows, strict=True)]
    for number, (duration, latency, resources, stream, _) in enumerate(rows):
        assert schedule.start[number] >= 0  # everything ran
        assert schedule.finish[number] == schedule.start[number] + duration + latency
        assert all(schedule.finish[before] <= schedule.start[number] for before in afters[number])
        for other in range(number):
            begin, end = schedule.start[other], ends[other]
            apart = end <= schedule.start[number] or ends[number] <= begin
            assert apart or not resources & rows[other][2], "two tasks hold one resource"
            assert stream == "-" or stream != rows[other][3] or end <= schedule.start[number]
    for resource in "abc":  # the bound that no schedule beats
        assert schedule.makespan >= sum(row[0] for row in rows if resource in row[2])
