"""Fails a full run that ran fewer tests than tests/floor.txt says; hooks for conftest.py.

A test counts when it ran, or was skipped for one of the reasons the file lists, up to the number it allows.
Runs of a selection (paths, -k, -m, --lf, ...) and runs that were stopped are not judged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Floor", "pytest_configure", "pytest_sessionfinish", "pytest_terminal_summary"]

FLOOR = Path(__file__).with_name("floor.txt")
_PROBLEMS = pytest.StashKey[list[str]]()
_NARROWING = ("keyword", "markexpr", "lf", "deselect", "collectonly", "ignore", "ignore_glob", "stepwise")


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What the file says: least tests, and how many may be skipped for which reason."""

    tests: int
    skips: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> Floor:
        tests, skips = 0, []
        for line in text.splitlines():
            match line.split(maxsplit=2):
                case ["tests", count]:
                    tests = int(count)
                case ["skip", count, reason]:
                    skips.append((int(count), reason))
                case [first, *_] if not first.startswith("#"):
                    raise ValueError(f"{FLOOR.name}: expected 'tests N' or 'skip N REASON', got {line!r}")
        return cls(tests=tests, skips=skips)

    def problems(self, ran: int, skipped: list[tuple[str, str]]) -> list[str]:
        """One line per broken promise; ``skipped`` holds (test, reason)."""
        found = []
        left = list(skipped)
        for allowed, pattern in self.skips:
            here = [entry for entry in left if re.search(pattern, entry[1])]
            left = [entry for entry in left if entry not in here]
            if len(here) > allowed:
                found.append(f"{len(here)} tests skipped for {pattern!r}, at most {allowed} may be")
        found += [f"{test} is skipped for a reason not in {FLOOR.name}: {reason}" for test, reason in left]
        if ran + len(skipped) < self.tests:
            total = f"{ran} ran and {len(skipped)} were skipped"
            found.append(f"{total}, but the suite holds at least {self.tests} tests: which ones are lost?")
        return found


def _is_full(config: pytest.Config) -> bool:
    from_ini = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return from_ini and not any(getattr(config.option, name, None) for name in _NARROWING)


def _skips(reporter: Any) -> list[tuple[str, str]]:
    reasons = []
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons.append((report.nodeid, reason))
    return reasons


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_PROBLEMS] = []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    judged = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if hasattr(config, "workerinput") or reporter is None or not judged or not _is_full(config):
        return
    ran = sum(len(reporter.stats.get(key, [])) for key in ("passed", "failed", "xfailed", "xpassed"))
    problems = Floor.parse(FLOOR.read_text(encoding="utf-8")).problems(ran, _skips(reporter))
    config.stash[_PROBLEMS] = problems
    if problems and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    problems = config.stash[_PROBLEMS]
    if problems:
        terminalreporter.section("the suite is not complete", red=True)
        for problem in problems:
            terminalreporter.write_line(problem, red=True)
