"""The long run, ``make verify``: everything, property tests under more seeds, sanitizers; writes a dated report.

``python -m tests.verify [--only NAME ...] [--report FILE]``; exit code 0 when every step passed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["STEPS", "Outcome", "main", "report"]

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "docs" / "verify-report.md"
SEEDS = 5


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a step: ``summary`` is the last line it printed."""

    name: str
    passed: bool
    seconds: float
    summary: str
    tail: str = ""


def run(command: list[str], env: Mapping[str, str] | None = None) -> tuple[bool, str]:
    """Runs a command in the checkout; whether it ended well, and what it printed (also shown as it comes)."""
    print("$", *command, flush=True)
    text = []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout or ():
        print(line, end="", flush=True)
        text.append(line)
    return process.wait() == 0, "".join(text)


def pytest(*arguments: str, env: Mapping[str, str] | None = None) -> tuple[bool, str]:
    return run([sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", *arguments], env)


def lint() -> tuple[bool, str]:
    return run(["make", "lint"])


def suite() -> tuple[bool, str]:
    return pytest()


def properties() -> tuple[bool, str]:
    """Hypothesis draws other examples under each seed."""
    results = [pytest("-m", "hypothesis", f"--hypothesis-seed={seed}") for seed in range(1, SEEDS + 1)]
    return all(passed for passed, _ in results), "".join(text for _, text in results)


def training() -> tuple[bool, str]:
    passed, text = run([sys.executable, "-m", "train.run"])
    lines = [line for line in text.splitlines() if "NDCG@10" in line and "popularity" in line]
    return passed, text + (" ".join(re.sub("[│┃]", " ", lines[-1]).split()) if lines else "no result")


def engine() -> tuple[bool, str]:
    """The engine without Python, as a C++ program under each sanitizer."""
    return pytest("tests/hybridcomm/test_sanitizers.py", env={"HYBRIDCOMM_SANITIZERS": "1"})


STEPS: dict[str, Callable[[], tuple[bool, str]]] = {
    "lint": lint,
    "tests": suite,
    "properties": properties,
    "training": training,
    "engine": engine,
}
_WHAT = {
    "lint": "format, lint, types, import directions",
    "tests": "the whole suite",
    "properties": f"property tests under {SEEDS} more seeds",
    "training": "the default training run",
    "engine": "the engine alone, a C++ program, under all three sanitizers",
}


def perform(name: str) -> Outcome:
    print(f"\n=== {name}: {_WHAT[name]}", flush=True)
    begin = time.monotonic()
    passed, text = STEPS[name]()
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["(nothing printed)"]
    summary = re.sub(r"\x1b\[[0-9;]*m", "", lines[-1]).strip("= ").replace("|", "/")
    return Outcome(
        name=name,
        passed=passed,
        seconds=time.monotonic() - begin,
        summary=summary.replace(str(ROOT), "."),
        tail="" if passed else "\n".join(lines[-30:]).replace(str(ROOT), "."),
    )


def facts() -> dict[str, str]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=False).stdout
    changed = ", with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton", "numpy")]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": (git("rev-parse", "HEAD") or "not in a git checkout") + changed,
        "processor": f"{processor[1] if processor else platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "system": f"{platform.system()} {platform.release()}, root: {'yes' if os.geteuid() == 0 else 'no'}",
        "software": f"Python {platform.python_version()}, {', '.join(versions)}, {compiler.splitlines()[0]}",
        "real data": "yes" if os.environ.get("HYBRIDCOMM_DATA") else "no (HYBRIDCOMM_DATA is not set)",
    }


def report(about: Mapping[str, str], outcomes: list[Outcome]) -> str:
    """The page, as Markdown."""
    lines = ["# Verification report", "", "Written by `make verify`.", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in about.items()]
    lines += ["", "| step | what | outcome | time | last line |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        verdict = "passed" if outcome.passed else "**FAILED**"
        what = _WHAT.get(outcome.name, "")
        lines.append(f"| {outcome.name} | {what} | {verdict} | {outcome.seconds:.0f} s | {outcome.summary} |")
    for outcome in outcomes:
        if outcome.tail:
            lines += ["", f"## {outcome.name}: the end of its output", "", "```", outcome.tail, "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.verify", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS), help="steps to run")
    parser.add_argument("--report", type=Path, default=REPORT, help="file to write")
    options = parser.parse_args()
    about = facts()
    outcomes = [perform(name) for name in options.only]
    options.report.write_text(report(about, outcomes), encoding="utf-8")
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    print(f"\n{options.report.name}: {f'FAILED: {failed}' if failed else 'all steps passed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
