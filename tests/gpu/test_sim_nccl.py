"""The simulated NCCL: a hierarchical all-reduce on four GPUs is right and silent, its planted bugs are told apart."""

from __future__ import annotations

import shutil

import pytest

from tests.gpu.simulation import EAGER, SEEDS, outcomes

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("gpu-sim"),  # one build serves all
]

BUGS = {
    "no wait": "race: nccl",
    "no wait back": "race: ",
    "one shard for all": "race: nccl",
    "another count": "mismatch: ncclReduceScatter",
    "another root": "mismatch: ncclBroadcast",
    "a call left out": "deadlock: ",
    "messages without a group": "deadlock: ",
    "out of bounds": "bounds: ncclAllGather",
    "communicator left": "leak: 4 communicators",
    "destroyed communicator": "stranger: a communicator that is none, or was destroyed",
    "used in progress": "misuse: a call on a communicator that is still in progress",
    "side by side": "unordered: nccl",
    "side by side, in NCCL's order, in two orders": "deadlock: ",
}


def test_a_right_program_is_right_and_silent() -> None:
    """200 seeds."""
    for turn in range(200 // SEEDS):
        for right, reports in outcomes("nccl_cases", "none", 1 + turn * SEEDS, EAGER[turn % len(EAGER)]):
            assert right
            assert reports == []


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_reported_whatever_the_order_was(bug: str) -> None:
    for eager in EAGER:
        for _, reports in outcomes("nccl_cases", bug, 1, eager):
            assert any(report.startswith(BUGS[bug]) for report in reports), (eager, reports)


def test_two_communicators_that_nothing_orders_are_a_deadlock_sometimes() -> None:
    """As on machines: each device has an order, but two may have two. Else values are right."""
    found = [each for eager in EAGER for each in outcomes("nccl_cases", "side by side", 1, eager)]
    stuck = [right for right, reports in found if any(line.startswith("deadlock") for line in reports)]
    assert 0 < len(stuck) < len(found)
    assert sum(right for right, _ in found) == len(found) - len(stuck)


def test_in_the_order_of_the_calls_two_communicators_are_right() -> None:
    """Which NCCL keeps from 2.26 on, if asked to."""
    for eager in EAGER:
        for right, reports in outcomes("nccl_cases", "side by side, in NCCL's order", 1, eager):
            assert right
            assert reports == []


def test_buckets_of_one_size_that_are_swapped_give_wrong_values() -> None:
    """Nothing that NCCL sees differs between ranks, so nothing can be reported but by the engine itself."""
    for right, reports in outcomes("nccl_cases", "buckets swapped", 1, 30):
        assert not right
        assert reports == []
