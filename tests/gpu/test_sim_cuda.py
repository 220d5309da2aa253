"""The simulated CUDA driver: silent on right programs under every seed, each planted bug reported for what it is."""

from __future__ import annotations

import shutil

import pytest

from tests.gpu.simulation import EAGER, SEEDS, outcomes

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("gpu-sim"),  # one build serves all
]

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


@pytest.mark.parametrize("program", ["none", "legacy"])
def test_right_programs_are_right_and_silent(program: str) -> None:
    """Ordered by events, or by the legacy stream alone; 200 seeds."""
    for turn in range(200 // SEEDS):
        for right, reports in outcomes("sim_cases", program, 1 + turn * SEEDS, EAGER[turn % len(EAGER)]):
            assert right
            assert reports == []


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_reported_whatever_the_order_was(bug: str) -> None:
    """Under every seed, also where nothing went wrong: that is what the clocks are for."""
    for eager in EAGER:
        for _, reports in outcomes("sim_cases", bug, 1, eager):
            assert any(report.startswith(BUGS[bug]) for report in reports), (eager, reports)


def test_what_the_host_reads_before_the_copy_has_run_is_poison() -> None:
    """No clock sees the host's own loads."""
    assert not any(right for right, _ in outcomes("sim_cases", "host read", 1, 0))
