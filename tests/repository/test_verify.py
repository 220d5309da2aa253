"""The verification report says what happened: commit, date, every step, and the output of what failed."""

from __future__ import annotations

from tests import verify
from tests.verify import Outcome


def test_the_report_names_failures_with_their_output() -> None:
    outcomes = [
        Outcome(name="lint", passed=True, seconds=3.4, summary="12 passed"),
        Outcome(name="tests", passed=False, seconds=60, summary="1 failed", tail="E assert 1 == 2"),
    ]
    page = verify.report({"commit": "abc"}, outcomes)
    assert "| commit | abc |" in page
    assert "| passed | 3 s | 12 passed |" in page
    assert "**FAILED**" in page
    assert "E assert 1 == 2" in page


def test_a_failing_command_is_a_failure() -> None:
    assert verify.run(["sh", "-c", "echo seen; exit 3"]) == (False, "seen\n")
    assert verify.run(["true"]) == (True, "")


def test_every_step_is_described() -> None:
    assert set(verify.STEPS) == set(verify._WHAT)
    about = verify.facts()
    assert about["commit"]
    assert about["date"].endswith("UTC")
