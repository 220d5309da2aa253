"""The simulated CUDA driver: silent on right programs under every seed, each planted bug reported for what it is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.gpu.test_abi import GPU, HERE, ROOT
from tests.gpu.test_loading import compile_cpp

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("gpu-sim"),  # one build serves all
]
SEEDS = 20  # of one run of the program
EAGER = (0, 30, 60, 90, 97)
"""Percent: how likely something runs as soon as it is enqueued."""

BUGS = {
    "no wait": "race: ",
    "no wait back": "race: ",
    "wait before record": "never recorded: cuStreamWaitEvent",
    "legacy, unordered": "race: ",
    "out of bounds": "bounds: add (reads): outside of its allocation",
    "another device": "stranger: cuMemsetD8Async (writes): memory of another device",
    "freed too early": "freed: ",
    "used after free": "freed: cuMemsetD8Async (writes): after cuMemFree",
    "memory left": "leak: device memory of 256 bytes",
    "event left": "leak: 2 events",
    "work left": "freed: cuMemsetD8Async (writes): after cuMemFree",
    "destroyed stream": "stranger: a stream that is none, or was destroyed",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The simulation as a library, and the program that is run on it."""
    folder = tmp_path_factory.mktemp("sim")
    sim = HERE / "sim"
    library = compile_cpp(
        folder / "libsim.so",
        "-shared",
        "-fPIC",
        "-pthread",
        "-O1",
        *sim.glob("*.cpp"),
        f"-I{GPU}",
        f"-I{sim}",
    )
    sources = [
        HERE / "sim_cases.cpp",
        GPU / "library.cpp",
        GPU / "tables.cpp",
        ROOT / "hybridcomm/csrc/common.cpp",
    ]
    return library, compile_cpp(folder / "sim_cases", *sources, f"-I{GPU}", "-ldl", "-pthread")


def outcomes(built: tuple[Path, Path], bug: str, seed: int, eager: int) -> list[tuple[bool, list[str]]]:
    """Of each seed: whether values were right, and what was reported."""
    library, program = built
    done = subprocess.run(
        [str(program), str(library), bug, str(seed), str(eager)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[tuple[bool, list[str]]] = []
    for line in done.stdout.splitlines():
        if line.startswith("seed "):
            found.append((line.endswith("right"), []))
        else:
            found[-1][1].append(line.strip())
    assert len(found) == SEEDS
    return found


@pytest.mark.parametrize("program", ["none", "legacy"])
def test_right_programs_are_right_and_silent(built: tuple[Path, Path], program: str) -> None:
    """Ordered by events, or by the legacy stream alone; 200 seeds."""
    for turn in range(200 // SEEDS):
        for right, reports in outcomes(built, program, 1 + turn * SEEDS, EAGER[turn % len(EAGER)]):
            assert right
            assert reports == []


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_reported_whatever_the_order_was(built: tuple[Path, Path], bug: str) -> None:
    """Under every seed, also where nothing went wrong: that is what the clocks are for."""
    for eager in EAGER:
        for _, reports in outcomes(built, bug, 1, eager):
            assert any(report.startswith(BUGS[bug]) for report in reports), (eager, reports)


def test_what_the_host_reads_before_the_copy_has_run_is_poison(built: tuple[Path, Path]) -> None:
    """No clock sees the host's own loads."""
    assert not any(right for right, _ in outcomes(built, "host read", 1, 0))
