"""Bugs planted in the GPU engine, in its source and in its Python half: scenarios on simulated devices notice each.

Without them the scenarios find nothing. Every run of the tests plants all of Python's and a few of the source's, with
``HYBRIDCOMM_MUTANTS`` (`make verify`) all of them, and runs what is sound under ten times as many seeds.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from tests.gpu import device_mutants, engine_mutants
from tests.gpu.device_scenarios import EAGER, SCENARIOS
from tests.gpu.engine_build import Build
from tests.gpu.mutant_driver import Job, findings
from tests.gpu.simulation import library
from tests.native import ROOT

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("gpu-engine"),
]

ALL = bool(int(os.environ.get("HYBRIDCOMM_MUTANTS", "0")))
SLOW = ("hangs", "lost")
"""Scenarios that wait for a timeout."""


def orders(seeds: int) -> tuple[tuple[int, int], ...]:
    return tuple(product(range(seeds), EAGER))


def sound(number: int, name: str) -> tuple[tuple[int, int], ...]:
    """The orders of scenario number ``number``: all seeds with `ALL`, else those that fall to it; each with one of the
    eager percentages."""
    if name in SLOW:
        return orders(1)
    every = [(seed, EAGER[(seed + number) % len(EAGER)]) for seed in range(200 if ALL else 20)]
    return tuple(every if ALL else every[number % 5 :: 5])


def test_each_bug_can_be_planted_in_the_source_as_it_is() -> None:
    for what, mutant in engine_mutants.MUTANTS.items():
        text = (ROOT / "hybridcomm/csrc" / mutant.file).read_text()
        assert [text.count(old) for old in mutant.changes] == [1] * len(mutant.changes), what
        assert set(mutant.scenarios) <= set(SCENARIOS), what
    assert {mutant.scenario for mutant in device_mutants.MUTANTS.values()} <= set(SCENARIOS)
    assert set(engine_mutants.QUICK) < set(engine_mutants.MUTANTS)


@pytest.mark.timeout(3600)
def test_bugs_planted_in_the_source_are_noticed(tmp_path: Path) -> None:
    names = list(engine_mutants.MUTANTS if ALL else engine_mutants.QUICK)
    mutants = [engine_mutants.MUTANTS[name] for name in names]
    build = Build.make(tmp_path / "build")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        modules = pool.map(lambda i: build.planted(i, mutants[i].file, mutants[i].changes), range(len(names)))
        jobs = [
            Job(name, str(module), "", mutant.scenarios, orders(4))
            for name, mutant, module in zip(names, mutants, modules, strict=True)
        ]
    needed = {scenario for mutant in mutants for scenario in mutant.scenarios}
    found = findings(
        library(),
        [*jobs, Job("", str(build.link(tmp_path / "_gpu.so")), "", tuple(sorted(needed)), orders(1), False)],
    )
    assert found.pop("") == []
    assert [name for name in names if not found[name]] == []


@pytest.mark.timeout(1200)
def test_bugs_planted_in_python_are_noticed() -> None:
    jobs = [
        Job(name, "", name, (each.scenario,), orders(each.seeds))
        for name, each in device_mutants.MUTANTS.items()
    ]
    found = findings(library(), jobs)
    assert [name for name in device_mutants.MUTANTS if not found[name]] == []


@pytest.mark.timeout(3600)
def test_nothing_is_found_where_no_bug_is() -> None:
    jobs = [Job(name, "", "", (name,), sound(i, name), False) for i, name in enumerate(SCENARIOS)]
    assert {order[0] for job in jobs for order in job.orders} == set(range(200 if ALL else 20))
    found = findings(library(), jobs)
    assert {name: lines for name, lines in found.items() if lines} == {}
