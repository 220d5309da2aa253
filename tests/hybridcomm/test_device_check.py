"""The checker of device plans, against a brute-force oracle: a transitive closure of what comes before what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcomm.device_check import check_operations, pruned
from hybridcomm.device_plan import START, Operation, Touch
from hybridcomm.errors import PlanError

STREAMS = ("codec", "intra", "inter")


def operation(stream: str, touches: Sequence[Touch], after: Sequence[int] = (), group: int = -1) -> Operation:
    return Operation(
        kind="copy",
        word="copy",
        stream=stream,
        step=0,
        touches=tuple(touches),
        after=tuple(after),
        group=group,
    )


def units(operations: Sequence[Operation]) -> list[int]:
    """Of each operation the first of its group, or itself."""
    firsts: list[int] = []
    for place, op in enumerate(operations):
        joins = place > 0 and op.group != -1 and operations[place - 1].group == op.group
        firsts.append(firsts[-1] if joins else place)
    return firsts


def before(operations: Sequence[Operation]) -> list[set[int]]:
    """What comes before each operation's unit, by repetition until nothing is added."""
    unit = units(operations)
    known: dict[int, set[int]] = {first: set() for first in unit}
    for place, op in enumerate(operations):
        known[unit[place]] |= {b if b == START else unit[b] for b in op.after}
        known[unit[place]] |= {unit[i] for i in range(unit[place]) if operations[i].stream == op.stream}
    grown = True
    while grown:
        grown = False
        for first, its in known.items():
            more = its.union(*(known[b] for b in its if b != START))
            grown = grown or more != its
            known[first] = more
    return [known[first] for first in unit]


def sound(operations: Sequence[Operation]) -> bool:
    unit, known = units(operations), before(operations)
    for j, op in enumerate(operations):
        if START not in known[j]:
            return False
        for i in range(j):
            conflict = any(
                (a.write or b.write) and a.begin < b.end and b.begin < a.end
                for a in operations[i].touches
                for b in op.touches
            )
            if conflict and unit[i] not in known[j]:
                return False
    return True


@st.composite
def plans(draw: st.DrawFn) -> list[Operation]:
    """A few operations on three streams, some in groups, with waits for some of those before them."""
    made: list[Operation] = []
    for number in range(draw(st.integers(1, 5))):
        stream, size = draw(st.sampled_from(STREAMS)), draw(st.sampled_from((1, 1, 1, 2, 3)))
        first = len(made)
        for _ in range(size):
            begin = draw(st.integers(0, 9))
            touch = Touch(begin, begin + draw(st.integers(1, 3)), draw(st.booleans()))
            most = draw(st.sampled_from((0, 1, first + 1)))
            after = draw(st.sets(st.integers(START, first - 1), max_size=most))
            made.append(operation(stream, [touch], sorted(after), number if size > 1 else -1))
    return made


@given(plans())
def test_plans_are_judged_as_a_transitive_closure_judges_them(operations: list[Operation]) -> None:
    try:
        check_operations(operations, hex)
        found = True
    except PlanError:
        found = False
    assert found == sound(operations)


@given(plans())
def test_what_is_superfluous_can_go_and_nothing_else(operations: list[Operation]) -> None:
    less = [replace(op, after=after) for op, after in zip(operations, pruned(operations), strict=True)]
    assert before(less) == before(operations)
    for place, op in enumerate(less):
        for wait in op.after:
            without = [*less]
            without[place] = replace(op, after=tuple(each for each in op.after if each != wait))
            assert before(without) != before(operations), (place, wait)


def test_missing_waits_are_told_with_both_operations() -> None:
    write = operation("codec", [Touch(0, 8, True)], [START])
    read = operation("inter", [Touch(4, 12, False)], [START])
    with pytest.raises(PlanError, match="operation 1 needs 0 first, as both touch 0x4"):
        check_operations([write, read], hex)
    assert check_operations([write, replace(read, after=(0,))], hex) == []
    with pytest.raises(PlanError, match="does not wait for the caller's stream"):
        check_operations([replace(write, after=())], hex)


def test_waits_that_add_nothing_are_listed() -> None:
    first = operation("codec", [Touch(0, 8, True)], [START])
    second = operation("inter", [Touch(0, 8, False)], [START, 0])
    third = operation("inter", [Touch(0, 8, True)], [0])
    assert check_operations([first, second, third], hex) == [(1, START), (2, 0)]


def test_one_wait_for_a_group_is_for_all_of_it() -> None:
    group = [
        operation("inter", [Touch(8 * i, 8 * i + 8, True)], [START] if i == 0 else [], 0) for i in range(2)
    ]
    behind = operation("codec", [Touch(0, 16, False)], [0, 1])
    assert check_operations([*group, behind], hex) == [(2, 0)]
    assert check_operations([*group, replace(behind, after=(0,))], hex) == []
    with pytest.raises(PlanError, match="both touch"):
        check_operations(
            [group[0], replace(group[1], touches=(Touch(8, 16, True), Touch(0, 8, True))), behind], hex
        )


@pytest.mark.parametrize("wait", [-2, 1, 2, 5])
def test_waits_for_what_does_not_come_before_are_refused(wait: int) -> None:
    """In a group, not for a neighbour either: they are put on the stream together."""
    group = [operation("inter", [Touch(8 * i, 8 * i + 8, True)], [START], 0) for i in range(1, 3)]
    operations = [operation("codec", [Touch(0, 8, True)], [START]), *group]
    operations[2] = replace(operations[2], after=(wait,))
    with pytest.raises(PlanError, match="does not come before it"):
        check_operations(operations, hex)
