"""The crossover benchmark: where two curves cross, which decisions were right, and a run on ranks of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_crossover import Line, crossover

ROOT = Path(__file__).parents[2]


def line(nbytes: int, dense: float, compressed: float, decision: str = "none") -> Line:
    return Line(
        nbytes=nbytes,
        predicted_dense=dense,
        predicted_compressed=compressed,
        measured_dense=2 * dense,
        measured_compressed=compressed,
        decision=decision,
    )


def test_the_crossover_of_powers_is_exact() -> None:
    """Dense proportional to the size, compressed constant: they meet where the size says so."""
    lines = [line(nbytes, nbytes / 1000, 3.0) for nbytes in (1000, 2000, 8000)]
    assert crossover(lines, "predicted") == pytest.approx(3000)
    assert crossover(lines, "measured") == pytest.approx(1500)
    assert crossover(lines[:1], "predicted") is None
    assert crossover([line(nbytes, 9.0, 3.0) for nbytes in (1000, 2000)], "predicted") is None


@pytest.mark.parametrize(
    ("dense", "compressed", "decision", "right", "lost"),
    [
        (10, 2, "topk", True, 0),
        (10, 2, "none", False, 18),
        (10, 19.5, "none", True, 0.5),  # it would not gain enough
        (10, 30, "topk", False, 10),
    ],
)
def test_decisions_are_judged_by_measured_times(
    dense: float, compressed: float, decision: str, right: bool, lost: float
) -> None:
    judged = line(1, dense, compressed, decision)
    assert (judged.right, judged.lost) == (right, lost)


def test_each_rank_measures_and_rank_0_prints() -> None:
    argv = [
        "--nproc",
        "2",
        "--nodes",
        "2",
        "-m",
        "benchmarks.bench_crossover",
        "--sizes",
        "4",
        "64",
        "--iters",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "hybridcomm.launch", *argv],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=True,
    )
    figures, *lines = (
        json.loads(text[text.index("{") :]) for text in done.stdout.splitlines() if "{" in text
    )
    assert "inter_node" in figures["figures"]
    measured = [Line(**fields) for fields in lines]
    assert [each.nbytes for each in measured] == [4096, 65536]
    assert all(min(each.measured_dense, each.predicted_compressed) > 0 for each in measured)
