"""Simulated ranks in several processes: values, clocks and faults go from one to another by the broker."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.gpu.broker import Broker
from tests.gpu.sim_nccl import unique_id
from tests.gpu.simulation import library
from tests.gpu.test_abi import ROOT

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("gpu-sim"),  # one build serves all
]


@dataclass(frozen=True, kw_only=True)
class Said:
    right: bool
    lines: list[str]


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with Broker() as made:
        yield made


def ranks(broker: Broker, case: str, count: int, seed: int = 1) -> list[Said]:
    """What each process said."""
    environment = {**os.environ, "HYBRIDCOMM_SIM": str(library()), "HYBRIDCOMM_SIM_BROKER": broker.path}
    identity = bytes(unique_id()).hex()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.sim_process", str(i), str(count), identity, case, str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        for i in range(count)
    ]
    try:
        outputs = [each.communicate(timeout=80) for each in processes]
    finally:
        for each in processes:
            each.kill()
    for each, (_, errors) in zip(processes, outputs, strict=True):
        assert each.returncode == 0, errors
    return [Said(**json.loads(output)) for output, _ in outputs]


@pytest.mark.parametrize(("count", "seed"), [(2, 0), (3, 1), (4, 2)])
def test_collectives_and_messages_between_processes(broker: Broker, count: int, seed: int) -> None:
    for said in ranks(broker, "everything", count, seed):
        assert said == Said(right=True, lines=[])


@pytest.mark.parametrize("seed", range(3))
def test_processes_may_have_several_ranks(broker: Broker, seed: int) -> None:
    for said in ranks(broker, "two threads", 2, seed):
        assert said == Said(right=True, lines=[])


@pytest.mark.parametrize("seed", range(3))
def test_clocks_go_through_other_processes(broker: Broker, seed: int) -> None:
    """What has been told by a message and its answer is known, and what has not is a race."""
    for said in ranks(broker, "told", 2, seed):
        assert said == Said(right=True, lines=[])
    first, second = ranks(broker, "not told", 2, seed)
    assert first.lines == ["race: cuMemsetD8Async (writes) is not ordered after cuMemsetD8Async (writes)"]
    assert second.lines == []


def test_whoever_waits_says_whom_it_misses(broker: Broker) -> None:
    *others, _ = ranks(broker, "missing", 3)
    for said in others:
        assert said.right
        assert said.lines[0].startswith("deadlock: nothing has moved for 1500 ms: ncclAllReduce of 1")
        assert "rank 2" in said.lines[0].split("has begun without ")[1]
    assert any(said.lines[0].endswith("without rank 2") for said in others)  # then that one withdraws too


def test_ranks_that_differ_are_told_in_every_process(broker: Broker) -> None:
    for said in ranks(broker, "another count", 2):
        assert said.right
        assert len(said.lines) == 1
        assert said.lines[0].startswith("mismatch: ncclAllReduce of ")


def test_a_lost_rank_leaves_the_others_stuck(broker: Broker) -> None:
    for said in ranks(broker, "lost", 3):
        assert said == Said(right=True, lines=[])


def test_nobody_at_the_socket_is_told(broker: Broker) -> None:
    away = Broker.__new__(Broker)
    away.path = f"{broker.path}-away"
    (said,) = ranks(away, "alone", 1)
    assert said.right
    assert said.lines[0] == f"misuse: HYBRIDCOMM_SIM_BROKER: nobody listens at {away.path}"
