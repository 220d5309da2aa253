"""A random walk through the collectives leaves nothing behind; `make verify` walks much farther (tests/soak.py)."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from hybridcomm.topology import Topology
from tests.census import trend
from tests.native import ROOT
from tests.soak import KINDS, LEAST_LEAK, MAX_NUMEL, draw
from tests.soak_codecs import CODECS, Codec
from tests.soak_operations import Draw


def walk(operations: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: it counts what the whole process holds."""
    era = str(max(10, operations // 30))
    command = [sys.executable, "-m", "tests.soak", "--operations", str(operations), "--era", era, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)


def test_six_hundred_operations_leave_nothing_behind() -> None:
    done = walk(600, "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "600 operations in 30 eras, seed 3, all exact" in done.stdout
    assert "nothing is left behind" in done.stdout


@pytest.mark.parametrize(("plant", "found"), [("works", "memory grows"), ("descriptors", "+90 descriptors")])
def test_control_a_planted_leak_is_found(plant: str, found: str) -> None:
    done = walk(100, "--plant", plant)
    assert done.returncode == 1, done.stdout + done.stderr
    assert found in done.stdout.splitlines()[-1]


def test_operations_are_the_same_on_all_ranks_and_cover_sizes_and_kinds() -> None:
    walks = [
        [draw(rng, number, KINDS) for number in range(2000)] for rng in (random.Random(1), random.Random(1))
    ]
    assert walks[0] == walks[1]
    sizes = [operation.numel for _, operation, _ in walks[0]]
    assert 0 in sizes
    assert MAX_NUMEL / 2 < max(sizes) < MAX_NUMEL
    assert {kind.name for kind, _, _ in walks[0]} == {kind.name for kind in KINDS}


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: str(codec.compress))
def test_control_a_wrong_compressed_sum_is_noticed(codec: Codec) -> None:
    topology = Topology.virtual(2, 2)
    operation = Draw(number=3, numel=1001, pick=5, async_op=False)
    parts = [codec.inputs(rank, topology, operation) for rank in range(4)]
    want = np.sum(parts, axis=0)
    for got in (np.zeros_like(want), parts[0], want - parts[2], np.roll(want, 1) + parts[0]):
        assert not codec.check(got, want, 2)


def test_a_trend_is_told_from_noise() -> None:
    rng = random.Random(5)
    noise = [(100.0 * i, 1e8 + rng.gauss(0, 1e5)) for i in range(100)]
    flat = trend(noise)
    assert abs(flat.slope) < flat.margin
    leak = LEAST_LEAK + 4 * flat.margin
    growing = trend([(x, y + leak * x) for x, y in noise])
    assert growing.slope - growing.margin > LEAST_LEAK
    with pytest.raises(ValueError, match="too few"):
        trend(noise[:3])
