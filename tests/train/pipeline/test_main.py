"""The command shows grid, bubble and memory, and answers mistakes in one line."""

from __future__ import annotations

import pytest

from train.pipeline import PipelineSchedule, check
from train.pipeline.__main__ import main


def test_it_shows_a_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--schedule", "zbv", "--ranks", "4", "--microbatches", "8"]) == 0
    shown = capsys.readouterr().out
    assert "stage on rank 0 1 2 3 3 2 1 0" in shown
    assert "bubble 5.9 % of 51 slots" in shown
    assert "by rank: 8 8 8 8" in shown
    assert shown.count("rank  ") == 4


def test_lists_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["--schedule", "1f1b+1", "--ranks", "3", "--microbatches", "4", "--split-head", "--list"]) == 0
    )
    schedule = PipelineSchedule.parse(capsys.readouterr().out)
    assert schedule.split_head
    check(schedule)


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ranks", "0"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "python -m train.pipeline: zbv: 0 ranks and 8 microbatches: both must be >= 1\n"
