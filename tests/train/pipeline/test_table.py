"""Lists as arrays: instructions are where the list has them, what has no place is set apart, insertions keep order."""

from __future__ import annotations

import numpy as np
from hypothesis import given

from tests.train.pipeline.builders import schedules, with_list
from train.pipeline import Instruction, PipelineSchedule, lower, make_schedule
from train.pipeline.lines import OP


@given(schedules())
def test_places_are_those_of_the_lists(schedule: PipelineSchedule) -> None:
    table, index, others = schedule.table, 0, []
    for rank, entries in enumerate(schedule.lists):
        for place, entry in enumerate(entries):
            assert table.event(index) == (rank, place)
            unit = entry.stage + rank * (entry.stage == schedule.head)
            if entry.op == "REDUCE":
                others.append((index, unit))
            for op in () if entry.op == "REDUCE" else "IW" if entry.op == "B" else (entry.op,):
                assert table.place[OP[op], unit, entry.microbatch] == index
            index += 1
    assert table.size == index
    assert table.others.tolist() == [other for other, _ in others]
    assert table.reduces == others
    wanted = table.place[table.lines.wanted]
    assert (
        len(np.unique(wanted)) + np.count_nonzero(table.op == OP["B"])
        == wanted.size
        == (wanted < index).sum()
    )


def test_what_has_no_place_is_set_apart() -> None:
    """An op of another rank's stage, one that the facts do not call for, microbatches and peers that are not there."""
    good = make_schedule("1f1b", 2, 3)
    strangers = [
        Instruction("F", 1, 0),
        Instruction("HEAD_S", 2, 0),
        Instruction("F", 0, 3),
        Instruction("X", 0),
    ]
    strangers += [
        Instruction("SEND_F", 0, 1, 1),
        Instruction("F", 0, 1, peer=1),
        Instruction("REDUCE", 7, bucket=0),
    ]
    table = with_list(good, 0, [*strangers, *good.lists[0]]).table
    assert table.others.tolist() == list(range(len(strangers)))
    assert table.reduces == []
    assert (table.place - len(strangers) == good.table.place).all()


def test_the_first_of_several_is_the_one() -> None:
    good = make_schedule("1f1b", 1, 2)
    again = with_list(good, 0, [*good.lists[0], *good.lists[0]]).table
    present = good.table.place < good.table.size
    assert (again.place[present] == good.table.place[present]).all()
    assert (again.place[~present] == again.size).all()


def test_insertions_keep_their_order_and_their_rank() -> None:
    """At the border between two lists the rank says to which of them an entry belongs."""
    schedule = lower(make_schedule("1f1b", 2, 1))
    border = int(schedule.table.begin[1])
    new = np.fromiter((Instruction("F", 9, number) for number in range(4)), object, 4)
    at, rank = np.array([border, border, 1, border]), np.array([1, 0, 0, 1])
    lists = schedule.table.insert(at, rank, new)
    first, second = schedule.lists
    assert lists == ((first[0], new[2], *first[1:], new[1]), (new[0], new[3], *second))
