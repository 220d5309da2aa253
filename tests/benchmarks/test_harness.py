"""The measuring harness itself: limits, tables, checks of results, and one small run on the cluster."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cluster import skip_reason
from benchmarks.table import table
from benchmarks.timing import Timing, link_bytes, wire_limit

_ROOT = Path(__file__).parents[2]
_REASON = skip_reason()


def test_wire_limit_of_64_mib_at_2_nodes_is_537_ms() -> None:
    assert wire_limit(2, 64 * 2**20, 1e9) == pytest.approx(0.536870912)
    assert wire_limit(4, 10**6, 8e6) == pytest.approx(1.5)
    assert wire_limit(1, 64 * 2**20, 1e9) == 0


def test_timing_takes_the_median_and_what_is_not_of_interest_off() -> None:
    assert Timing.of([0.5, 0.2, 0.3], minus=0.1) == Timing(
        median=pytest.approx(200), least=pytest.approx(100), greatest=pytest.approx(400)
    )


def test_table_is_aligned_markdown() -> None:
    assert table(["a", "ms"], [["gloo", "1.0"]]) == "| a    |  ms |\n| :--- | --: |\n| gloo | 1.0 |"


def test_link_bytes_reads_the_kernels_counter() -> None:
    before = link_bytes("lo")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
    ):
        other, _ = server.accept()
        with other:
            one.sendall(bytes(10_000))
            left = 10_000
            while left:
                left -= len(other.recv(left))
    assert link_bytes("lo") - before >= 10_000
    assert link_bytes("no-such-device") == 0


def test_checks_of_results_hold_and_catch_planted_faults() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    argv = [sys.executable, "-m", "hybridcomm.launch", "--nproc", "2", "--nodes", "2"]
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [*argv, str(Path(__file__).with_name("harness_worker.py"))],
        env={**os.environ, **master, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the residual law is off") == 2  # on each rank
    assert done.stdout.count("wrong sum") == 2


@pytest.mark.root
@pytest.mark.skipif(_REASON is not None, reason=_REASON or "")
def test_all_reduce_benchmark_measures_every_peer(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    argv = [sys.executable, "-m", "benchmarks.bench_allreduce", "--sizes", "0.25", "--rounds", "2"]
    done = subprocess.run(
        [*argv, "--json", str(out)], cwd=_ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = {line["key"]: line for line in json.loads(out.read_text())[0]["lines"]}
    assert set(lines) == {
        "gloo",
        "fp16",
        "powersgd",
        "topk-naive",
        "ours",
        "ours-topk",
        "ours-reducer",
        "local",
    }
    dense = 2 * 0.25 * 2**20  # 2 (M - 1) / M * S from each of the two nodes
    assert dense <= lines["ours"]["engine_bytes"] <= 1.05 * dense
    assert lines["ours"]["counted_bytes"] == pytest.approx(lines["ours"]["engine_bytes"], rel=0.07)
    assert lines["ours-topk"]["engine_bytes"] < lines["ours"]["engine_bytes"] / 50


def test_in_host_benchmark_prints_both_peers() -> None:
    argv = [sys.executable, "-m", "pytest", "benchmarks/bench_inhost.py", "-q", "-k", "2-ranks and 64KiB"]
    # pytest-benchmark turns itself off where it sees a worker of xdist, which this test may run in.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(argv, cwd=_ROOT, capture_output=True, text=True, timeout=110, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 2 ranks 64 KiB |" in done.stdout
