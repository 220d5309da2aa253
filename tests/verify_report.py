"""The page that the long run writes: a row per step with its commit; what of it still holds, and how old it is."""

from __future__ import annotations

import datetime
import re
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Outcome", "Staleness", "git", "kept", "report", "staleness", "unchanged"]

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "docs" / "verify-report.md"
SOURCES = ("hybridcomm", "kernels", "CMakeLists.txt")
"""What a report is about: commits that change these make it older."""
SHORT = 12
"""Digits of a commit in a step's row."""
MAX_COMMITS, MAX_DAYS = 300, 30
"""A report that is older fails the tests; before that it is a warning in every run."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a step on a commit: ``summary`` is the last line it printed, ``details`` Markdown of its own."""

    name: str
    commit: str
    passed: bool
    seconds: float
    summary: str
    tail: str = ""
    details: str = ""


def git(*arguments: str) -> str:
    """What git says about the checkout; empty where it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def report(about: Mapping[str, str], outcomes: list[Outcome], steps: Mapping[str, str]) -> str:
    """The page, as Markdown; ``steps``: what each is, by name."""
    lines = ["# Verification report", "", "Written by `make verify`.", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in about.items()]
    lines += ["", "| step | what | commit | outcome | time | last line |", "|---|---|---|---|---|---|"]
    for outcome in outcomes:
        verdict = "passed" if outcome.passed else "**FAILED**"
        what = steps.get(outcome.name, "")
        commit, took = outcome.commit[:SHORT] or "unknown", f"{outcome.seconds:.0f} s"
        lines.append(f"| {outcome.name} | {what} | {commit} | {verdict} | {took} | {outcome.summary} |")
    for outcome in outcomes:
        if outcome.details:
            lines += ["", f"## {outcome.name}", "", outcome.details]
        if outcome.tail:
            lines += ["", f"## {outcome.name}: the end of its output", "", "```", outcome.tail, "```"]
    return "\n".join(lines) + "\n"


def unchanged(since: str, about: tuple[str, ...]) -> bool:
    """Whether the commit is of this history, and neither a later one nor the checkout differs in these paths."""
    command = ["git", "diff", "--quiet", since, "--", *about]
    ours = subprocess.run(
        ["git", "merge-base", "--is-ancestor", since, "HEAD"], cwd=ROOT, check=False, capture_output=True
    )
    return (
        ours.returncode == 0
        and subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode == 0
    )


def kept(page: str, about: Mapping[str, tuple[str, ...]]) -> list[Outcome]:
    """The steps of a report that say what they would say now, as far as the sources go; others may be added.

    ``about``: pathspecs by step; others are none any more.
    """
    if "with uncommitted changes" in page:
        return []
    rows = re.findall(
        r"^\| (\w+) \|[^|]*\| ([0-9a-f]+) \| (passed|\*\*FAILED\*\*) \| (\d+) s \| (.*) \|$",
        page,
        re.MULTILINE,
    )
    found = []
    for name, commit, verdict, seconds, summary in rows:
        if name not in about or not unchanged(commit, about[name]):
            continue
        details = re.search(rf"^## {name}\n\n(.*?)(?=\n\n## |\Z)", page, re.MULTILINE | re.DOTALL)
        tail = re.search(
            rf"^## {name}: the end of its output\n\n```\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL
        )
        found.append(
            Outcome(
                name=name,
                commit=git("rev-parse", commit),
                passed=verdict == "passed",
                seconds=float(seconds),
                summary=summary,
                tail=tail[1] if tail else "",
                details=details[1].strip() if details else "",
            )
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Staleness:
    """How far the sources have moved on since a report was written."""

    commit: str
    known: bool
    """Whether this history has the report's commit: else there is nothing to count."""
    commits: int
    """That changed `SOURCES` since."""
    days: float
    """From the report to the newest commit; no clock is asked."""
    dirty: bool
    missing: tuple[str, ...]
    """Steps that did not run, or failed."""

    @property
    def too_old(self) -> bool:
        return self.commits > MAX_COMMITS or self.days > MAX_DAYS

    def __str__(self) -> str:
        text = (
            f"{REPORT.name} is of commit {self.commit[:9]}, {self.days:.0f} days and {self.commits} commits to "
            f"{', '.join(SOURCES)} ago"
        )
        if not self.known:
            text = f"{REPORT.name} is of commit {self.commit[:9]}, which is not in this history"
        text += ", with uncommitted changes then" if self.dirty else ""
        text += f"; not passed in it: {', '.join(self.missing)}" if self.missing else ""
        return (
            f"{text}. `make verify` writes a new one (at most {MAX_COMMITS} commits and {MAX_DAYS} days old)"
        )


def staleness(page: str, steps: Collection[str]) -> Staleness | None:
    """Of a report's text, judged by the checkout; None where there is no git history to judge by.

    ``steps``: the names of those that it should have.
    """
    head = git("log", "-1", "--format=%ct")
    commit = re.search(r"\| commit \| ([0-9a-f]{40})", page)
    date = re.search(r"\| date \| (\S+ \S+) UTC", page)
    if not head:
        return None
    if commit is None or date is None:
        raise ValueError(f"{REPORT.name} names no commit or no date: write it anew with make verify")
    written = datetime.datetime.strptime(date[1], "%Y-%m-%d %H:%M").replace(tzinfo=datetime.timezone.utc)
    known = bool(git("cat-file", "-t", commit[1]))
    since = git("rev-list", "--count", f"{commit[1]}..HEAD", "--", *SOURCES) if known else ""
    passed = re.findall(r"^\| (\w+) \|[^|]*\|[^|]*\| passed \|", page, re.MULTILINE)
    return Staleness(
        commit=commit[1],
        known=known,
        commits=int(since or 0),
        days=max((int(head) - written.timestamp()) / 86400, 0.0),
        dirty="with uncommitted changes" in page,
        missing=tuple(name for name in steps if name not in passed),
    )
