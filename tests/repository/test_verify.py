"""The verification report says what happened: commit, date, every step, what failed and how; and its age."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pytest

from tests import verify, verify_report
from tests.verify import Step
from tests.verify_report import Outcome, Staleness, staleness

WHAT = {name: step.what for name, step in verify.STEPS.items()}


def test_the_report_names_failures_with_their_output() -> None:
    outcomes = [
        Outcome(
            name="lint",
            commit="c" * 40,
            passed=True,
            seconds=3.4,
            summary="12 passed",
            details="| target | 10,000,000 |",
        ),
        Outcome(
            name="tests",
            commit="d" * 40,
            passed=False,
            seconds=60,
            summary="1 failed",
            tail="E assert 1 == 2",
        ),
    ]
    page = verify_report.report({"commit": "abc"}, outcomes, WHAT)
    assert "| commit | abc |" in page
    assert "| cccccccccccc | passed | 3 s | 12 passed |" in page
    assert "**FAILED**" in page
    assert "E assert 1 == 2" in page
    assert "## lint\n\n| target | 10,000,000 |" in page


def test_a_failing_command_is_a_failure() -> None:
    assert verify.run(["sh", "-c", "echo seen; exit 3"]) == (False, "seen\n")
    assert verify.run(["true"]) == (True, "")


def test_steps_may_add_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(options: argparse.Namespace, details: Path) -> tuple[bool, str]:
        details.write_text(f"| runs | {options.fuzz_runs} |\n")
        return True, "all clean\n"

    monkeypatch.setitem(verify.STEPS, "framings", Step(what="x", run=run))
    outcome = verify.perform("framings", argparse.Namespace(fuzz_runs=7))
    assert (outcome.passed, outcome.summary, outcome.details) == (True, "all clean", "| runs | 7 |")


def test_every_step_is_described() -> None:
    assert all(step.what for step in verify.STEPS.values())
    about = verify.facts()
    assert about["commit"]
    assert about["date"].endswith("UTC")


HEAD = "a" * 40
ABOUT = {name: step.about for name, step in verify.STEPS.items()}


def test_steps_stay_in_a_report_while_what_they_are_about_does(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [
        Outcome(
            name="framings",
            commit=HEAD,
            passed=True,
            seconds=60,
            summary="15 targets",
            details="| target |\n|---|\n| a |",
        ),
        Outcome(name="soak", commit=HEAD, passed=False, seconds=3, summary="leaks", tail="rank 1\nleaks"),
    ]
    page = verify_report.report({"commit": "b" * 40}, outcomes, WHAT)
    changed: set[tuple[str, ...]] = set()
    monkeypatch.setattr(verify_report, "git", lambda *_: HEAD)
    monkeypatch.setattr(
        verify_report, "unchanged", lambda since, about: HEAD.startswith(since) and about not in changed
    )
    assert verify_report.kept(page, ABOUT) == outcomes
    changed.add(verify.STEPS["soak"].about)
    assert verify_report.kept(page, ABOUT) == outcomes[:1]
    dirty = verify_report.report({"commit": HEAD + ", with uncommitted changes"}, outcomes, WHAT)
    assert verify_report.kept(dirty, ABOUT) == []


def test_what_a_step_is_about_exists_and_is_compared_with_the_checkout() -> None:
    """Every path names files; since the first commit they have changed, and since the last they have not."""
    first = verify_report.git("rev-list", "--max-parents=0", "HEAD").split()
    if not first:
        pytest.skip("not a git checkout")
    for name, step in verify.STEPS.items():
        for path in step.about:
            assert verify_report.git("ls-files", "--", path), (name, path)
        assert not verify_report.unchanged(first[0], step.about), name
    assert not verify_report.unchanged("0" * 40, (".",))
    untouched = ("LICENSE",)
    assert verify_report.unchanged(verify_report.git("rev-parse", "HEAD"), untouched)


# -- how old the report is ---------------------------------------------------------------------------------


def page(
    *, commit: str, date: str = "2026-11-24 04:10 UTC", steps: tuple[str, ...] = tuple(verify.STEPS)
) -> str:
    outcomes = [Outcome(name=name, commit="e" * 40, passed=True, seconds=1, summary="ok") for name in steps]
    return verify_report.report({"date": date, "commit": commit}, outcomes, WHAT)


def history(monkeypatch: pytest.MonkeyPatch, *, commits: int, days: float, known: bool = True) -> None:
    """A checkout whose newest commit is that far from the reports of `page`."""
    written = 1_795_493_400  # 2026-11-24 04:10 UTC

    def git(*arguments: str) -> str:
        answers = {"log": str(int(written + 86400 * days)), "cat-file": "commit" if known else ""}
        return answers.get(arguments[0], str(commits))

    monkeypatch.setattr(verify_report, "git", git)


@pytest.mark.parametrize(
    ("commits", "days", "too_old"),
    [
        (0, 0.0, False),
        (verify_report.MAX_COMMITS, 29.9, False),
        (verify_report.MAX_COMMITS + 1, 1.0, True),
        (1, 30.1, True),
    ],
)
def test_age_is_counted_in_commits_and_days(
    monkeypatch: pytest.MonkeyPatch, commits: int, days: float, too_old: bool
) -> None:
    history(monkeypatch, commits=commits, days=days)
    stale = staleness(page(commit="a" * 40), verify.STEPS)
    assert stale is not None
    assert (stale.commits, stale.too_old, stale.missing) == (commits, too_old, ())
    assert stale.days == pytest.approx(days, abs=1e-4)
    assert f"{commits} commits" in str(stale)


def test_what_the_report_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    history(monkeypatch, commits=1, days=0, known=False)
    stale = staleness(
        page(commit="b" * 40 + ", with uncommitted changes", steps=("lint", "tests")), verify.STEPS
    )
    assert stale is not None
    assert "not in this history" in str(stale)
    assert "uncommitted changes" in str(stale)
    assert "framings" in stale.missing
    assert "lint" not in stale.missing
    with pytest.raises(ValueError, match="names no commit"):
        staleness("# nothing\n", verify.STEPS)


class ReportIsStaleWarning(UserWarning):
    """Shown, and counted, at the end of every run."""


def test_the_report_in_this_checkout_is_not_too_old() -> None:
    """A warning as long as it does not describe the newest sources, a failure when it is far behind."""
    stale: Staleness | None = staleness(verify_report.REPORT.read_text(encoding="utf-8"), verify.STEPS)
    if stale is None:
        pytest.skip("not a git checkout")
    if stale.commits or not stale.known or stale.dirty or stale.missing:
        warnings.warn(ReportIsStaleWarning(str(stale)), stacklevel=1)
    assert not stale.too_old, stale
