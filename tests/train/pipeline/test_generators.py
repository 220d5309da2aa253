"""Schedules of every kind, for any ranks and microbatches: they pass the checker, as written and lowered."""

from __future__ import annotations

import pytest

from train.pipeline.checker import check
from train.pipeline.generators import SCHEDULES, make_schedule
from train.pipeline.passes import add_communication, add_reduce


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_schedules_are_correct_for_any_number_of_microbatches(name: str, ranks: int) -> None:
    for microbatches in range(1, 2 * ranks + 4):
        schedule = make_schedule(name, ranks, microbatches)
        check(schedule)
        check(add_reduce(add_communication(schedule), 2))
