"""The self-test of the GPU engine, whole, on simulated GPUs: it passes, and what is planted is in its report."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels' host code is not there")

from hybridcomm import device_comms
from hybridcomm.device_context import DeviceContext
from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.selftest import cases, orders, verbs
from hybridcomm.selftest.cases import Case
from hybridcomm.selftest.engine import Options, layouts, listing
from hybridcomm.selftest.rank import Rank
from hybridcomm.selftest.reductions import feedback
from hybridcomm.selftest.under_way import buckets
from hybridcomm.topology import Topology
from tests.gpu import simulated
from tests.gpu.broker import Broker
from tests.gpu.calls import Call
from tests.gpu.device_mutants import swaps_buckets
from tests.gpu.device_ranks import run_devices
from tests.gpu.selftest_ranks import Outcome, selftest
from tests.gpu.simulation import library
from tests.gpu.twins import twin_of
from tests.repository.layout import ROOT

pytestmark = [pytest.mark.xdist_group("gpu-engine"), pytest.mark.timeout(300)]

CODECS = (
    "topk:0.01",
    "gtopk:0.01",
    "int8",
    "powersgd:2",
    "randk:0.01",
)  # the others: test_device_allreduce.py
SMALL = Options(codecs=CODECS, numel=1 << 12, seeds=1, sizes=(1 << 14,), rounds=1, timeout=30.0, watch=0.0)
FAST = Options(codecs=(), numel=1 << 12, seeds=0, sizes=(), timeout=3.0, watch=0.05)


def only(*chosen: Case) -> Any:
    """The table of cases has these alone."""
    return mock.patch.object(cases, "conformance", return_value=chosen)


def case(body: Callable[[Rank], list[str]], name: str = "planted", **options: Any) -> Case:
    return Case(name=name, body=body, against="", **options)


def counted(report: str) -> tuple[int, int, int, int]:
    """Cases that passed, failed, were not run, were left out."""
    found = re.search(r"(\d+) passed, (\d+) failed, (\d+) not run, (\d+) left out", report)
    assert found is not None
    return tuple(map(int, found.groups()))  # type: ignore[return-value]


def would_run(topology: Topology, options: Options) -> int:
    found = re.search(r"(\d+) cases would be", listing(topology, options))
    assert found is not None
    return int(found[1])


def passed(outcome: Outcome) -> bool:
    return set(outcome.codes) == {0} and outcome.simulated == [] and "self-test: PASSED" in outcome.report


@pytest.mark.parametrize("world", [1, 2])
def test_everything_passes_and_runs_as_a_dry_run_says(world: int, tmp_path: Path) -> None:
    options = Options(**{**vars(SMALL), "report": tmp_path / "report.md"})
    outcome = selftest(world, options, kernels=(0, "all codecs are right\n"))
    assert passed(outcome), outcome
    report = outcome.report
    assert counted(report)[0] == would_run(Topology.virtual(1, world), options)
    for part in ("| NCCL | 21805 (", "| GPU | simulated GPU, sm_90 |", "## Kernels, rank 0"):
        assert part in report
    for title in ("dense flat", "of torch.distributed", "a Reducer's step", "all_to_all"):
        assert title in report
    acts = world > 1
    assert ("allreduce, powersgd:2, with error feedback" in report) == acts
    assert ("Left out (needs 2 nodes: nothing is compressed inside one): topk" in report) != acts
    assert (tmp_path / "report.md").read_text() == report


def test_the_command_runs_in_several_processes(tmp_path: Path) -> None:
    """As under any launcher; the ranks' GPUs are simulated, and meet at a broker."""
    report = tmp_path / "report.md"
    command = [
        *("--nproc", "2", "-m", "tests.gpu.selftest_process", "engine", "--only", "int8", "randk:0.01"),
        *("--numel", "4096", "--seeds", "1", "--sizes", "16K", "--rounds", "1", "--nodes", "2"),
        *("--report", str(report)),
    ]  # fmt: skip
    with Broker() as broker:
        done = subprocess.run(
            [sys.executable, "-m", "hybridcomm.launch", *command],
            env={**os.environ, "HYBRIDCOMM_SIM": str(library()), "HYBRIDCOMM_SIM_BROKER": broker.path},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == report.read_text() + "\n"
    assert "self-test: PASSED" in done.stdout
    assert "| int8, two-stage, error feedback | host's bits | passed" in done.stdout


@pytest.mark.parametrize("world", [1, 2])
def test_an_abort_ends_it_well(world: int) -> None:
    with only(case(orders.changed)):
        outcome = selftest(world, Options(**{**vars(FAST), "nodes": (1,), "abort": True}))
    assert set(outcome.codes) == {0}
    assert "| an abort on one rank | typed error in time | passed" in outcome.report


@pytest.mark.parametrize("eager", [0, 97])
def test_cases_of_no_other_test_pass_on_nodes_of_unequal_size(eager: int) -> None:
    bodies = {
        "moves": verbs.moves("int8"),
        "reduces": verbs.reduces("float16"),
        "groups": verbs.groups,
        "awaited": verbs.awaited,
        "orders": orders.orders(range(eager, eager + 3), ("topk:0.01", "randk:0.01", "bf16"), 1 << 12),
        "swapped": orders.swapped,
        "changed": orders.changed,
    }

    def body(rank: Rank) -> dict[str, list[str]]:
        return {name: each(rank) for name, each in bodies.items()}

    results, reports = run_devices(Topology.from_sizes((2, 1)), body, seed=eager, eager_percent=eager)
    assert results == [{name: [] for name in bodies}] * 3
    assert reports == []


def test_a_kernel_that_computes_something_else_is_in_the_report() -> None:
    """A twin of int8's decoder whose first element is another in its last bit."""
    name = "int8_decode"

    def wrong(kernel: DeviceKernel) -> Any:
        right = twin_of(kernel)

        def run(call: Call) -> None:
            right(call)
            call.bytes("out", 0, 1)[0] ^= 1

        return run

    simulated.register(name, twin=wrong)
    try:
        with only(
            case(feedback("int8", "gather", 1 << 12), "int8", nodes=2),
            case(feedback("bf16", "gather", 1 << 12), "bf16", nodes=2),
        ):
            outcome = selftest(2, Options(**{**vars(FAST), "nodes": (2,)}))
    finally:
        simulated.register(name)
    assert outcome.codes == [1, 1]
    assert counted(outcome.report)[:2] == (1, 1)
    assert re.search(
        r"\*\*int8\*\*, nodes 0\|1\n\n```\nrank 0: value: step 0, \d+ of 4096 elements", outcome.report
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_swapped_buckets_are_in_the_report(seed: int) -> None:
    real = DeviceContext.allreduce
    planted = mock.patch.object(
        DeviceContext, "allreduce", lambda self, t, **named: swaps_buckets(real, self, t, **named)
    )
    with only(case(buckets, "buckets", nodes=2)), planted:
        outcome = selftest(2, Options(**{**vars(FAST), "nodes": (2,)}), seed=seed)
    assert outcome.codes == [1, 1]
    assert "**buckets**, nodes 0|1" in outcome.report


@pytest.mark.parametrize(
    ("control", "blinded", "told"),
    [
        (orders.changed, (orders, "all_differ", lambda *_: []), "a changed element was not noticed"),
        (orders.swapped, (device_comms, "compare", lambda *_: None), "swapped buckets were not reported"),
        (orders.aborted, (DeviceContext, "abort", lambda _: None), "an abort on another rank raised nothing"),
    ],
)
def test_a_control_fails_where_the_check_it_controls_is_gone(
    control: Callable[[Rank], list[str]], blinded: tuple[Any, str, Any], told: str
) -> None:
    with only(case(control)), mock.patch.object(*blinded):
        outcome = selftest(2, Options(**{**vars(FAST), "nodes": (1,), "timeout": 1.5}))
    assert outcome.codes == [1, 1]
    assert told in outcome.report


def test_a_case_that_raises_on_one_rank_ends_there_and_the_next_one_runs() -> None:
    def raising(rank: Rank) -> list[str]:
        if rank.rank == 1:
            raise ZeroDivisionError("planted")
        return orders.changed(rank)

    with only(case(raising), case(orders.changed, "behind")):
        outcome = selftest(2, Options(**{**vars(FAST), "nodes": (1,)}))
    assert outcome.codes == [1, 1]
    assert counted(outcome.report)[:3] == (1, 1, 0)
    first = outcome.report.split("```\n")[1].splitlines()[0]
    assert first == "rank 1: ZeroDivisionError: planted"


def test_a_rank_that_never_comes_is_named() -> None:
    outcome = selftest(2, Options(**{**vars(FAST), "timeout": 1.0}), ranks=lambda rank: rank == 0)
    assert outcome.codes == [1, None]
    assert "**connect**, nodes detected" in outcome.report
    assert "these ranks of 2 had not come: 1" in outcome.report
    assert "rank 1: has not come back from it: it has ended, or hangs" in outcome.report


def test_a_rank_that_ends_in_a_case_is_named_and_what_follows_is_not_run() -> None:
    def ending(rank: Rank) -> list[str]:
        if rank.rank == 1:
            raise SystemExit(3)
        return []

    with only(case(ending), case(orders.changed, "behind")):
        outcome = selftest(2, Options(**{**vars(FAST), "nodes": (1,), "timeout": 1.5, "sizes": (1 << 14,)}))
    assert outcome.codes[0] == 1
    assert isinstance(outcome.codes[1], SystemExit)
    assert counted(outcome.report)[:3] == (0, 1, 2)
    assert "rank 1: has not come back from it" in outcome.report
    assert "| behind |  | NOT RUN: contexts were lost in 'planted'; ranks [1] have gone |" in outcome.report
    assert "| timings |  | NOT RUN: contexts were lost before |" in outcome.report


def test_kernels_that_are_wrong_on_any_rank_fail_it() -> None:
    with only(case(orders.changed)):
        outcome = selftest(2, Options(**{**vars(FAST), "nodes": (1,)}), kernels=(1, "int8: WRONG\n"))
    assert outcome.codes == [1, 1]
    assert "int8: WRONG" in outcome.report


def test_layouts_are_those_where_something_is_compressed() -> None:
    assert layouts(Topology.virtual(1, 1), ()) == [Topology.virtual(1, 1)]
    assert list(map(str, layouts(Topology.virtual(1, 4), ()))) == ["0,1,2,3", "0,1|2,3", "0|1|2|3"]
    assert list(map(str, layouts(Topology.virtual(2, 2), ()))) == ["0,1|2,3"]
    assert list(map(str, layouts(Topology.virtual(1, 3), (2, 2)))) == ["0,1|2"]
