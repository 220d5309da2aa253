"""The floor under the number of tests: a run that lost tests, or skips them for no known reason, fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.floor import FLOOR, Floor
from tests.repository.layout import ROOT

RULES = Floor.parse("# comment\ntests 5\nskip 2 needs root|iproute2\n")


def test_the_file_parses() -> None:
    floor = Floor.parse(FLOOR.read_text())
    assert floor.tests > 0
    assert floor.skips


def test_a_complete_run_has_no_problem() -> None:
    assert RULES.problems(5, []) == []
    assert RULES.problems(3, [("a", "Skipped: needs root"), ("b", "Skipped: iproute2 is missing")]) == []


@pytest.mark.parametrize(
    ("ran", "skipped", "text"),
    [
        (4, [], "at least 5"),
        (5, [("a", "no time")], "a is skipped for a reason not in"),
        (5, [(name, "needs root") for name in "abc"], "at most 2"),
    ],
)
def test_lost_tests_are_a_problem(ran: int, skipped: list[tuple[str, str]], text: str) -> None:
    problems = RULES.problems(ran, skipped)
    assert len(problems) == 1
    assert text in problems[0]


def test_a_wrong_line_is_named() -> None:
    with pytest.raises(ValueError, match="skips 3"):
        Floor.parse("skips 3 root")


@pytest.mark.parametrize(("count", "code"), [(2, 0), (3, 1)])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_full_run_is_judged(tmp_path: Path, count: int, code: int, workers: str) -> None:
    """A suite of two tests under a floor of ``count``, with and without xdist."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "floor.txt").write_text(f"tests {count}\n")
    (tmp_path / "tests" / "test_two.py").write_text("def test_a(): assert 1\ndef test_b(): assert 1\n")
    (tmp_path / "tests" / "conftest.py").write_text((ROOT / "tests" / "floor.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", workers]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    assert ("the suite is not complete" in result.stdout) == bool(code)
    assert "2 passed" in result.stdout.splitlines()[-1]
    narrowed = subprocess.run([*command, "-k", "a"], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert narrowed.returncode == 0
