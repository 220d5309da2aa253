"""The launcher: exit codes, environments, who is ended when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridcomm.errors import UnsupportedError
from hybridcomm.launch import launch
from tests.rank_processes import ROOT

ENV = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*arguments: str, limit: float = 60.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hybridcomm.launch", *arguments],
        env={**os.environ, **ENV},
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
        cwd="/",
    )


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def test_ranks_get_their_places_and_arguments(tmp_path: Path) -> None:
    text = """
import os, sys
import numpy as np, hybridcomm
ctx = hybridcomm.init(timeout=30)
value = np.full(10, ctx.rank + 1, np.float32)
hybridcomm.allreduce(value)
line = f"{os.environ['RANK']} {os.environ['LOCAL_RANK']} {ctx.topology} {value[0]:.0f} {sys.argv[1:]}"
os.write(1, (line + chr(10)).encode())
"""
    done = run("--nproc", "3", "--nodes", "2", script(tmp_path, text), "--flag", "x")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{r} {r} 0,1|2 6 ['--flag', 'x']" for r in range(3)]


def test_the_first_failing_ranks_code_is_the_jobs(tmp_path: Path) -> None:
    text = """
import os, sys, numpy as np, hybridcomm
ctx = hybridcomm.init(timeout=60)
if ctx.rank == 1:
    os._exit(7)
hybridcomm.allreduce(np.ones(10))
"""
    begin = time.monotonic()
    done = run("--nproc", "3", script(tmp_path, text))
    assert done.returncode == 7
    assert "rank 1 exited with code 7" in done.stderr
    assert "PeerLostError" in done.stderr, "the others said what they saw before they were ended"
    assert time.monotonic() - begin < 40


@pytest.mark.parametrize("first", [0, 2])
def test_the_first_to_fail_is_known_when_all_have_failed(tmp_path: Path, first: int) -> None:
    """The launcher is stopped while ranks end one after the other: it finds all of them ended at once."""
    text = """
import os, pathlib, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
(folder / f"pid{rank}").write_text(str(os.getpid()))
while not (folder / f"go{rank}").exists():
    time.sleep(0.01)
os._exit(10 + int(rank))
"""
    command = [
        sys.executable,
        "-m",
        "hybridcomm.launch",
        "--nproc",
        "3",
        script(tmp_path, text),
        str(tmp_path),
    ]
    job = subprocess.Popen(command, env={**os.environ, **ENV}, stderr=subprocess.PIPE, text=True, cwd="/")
    pids = [int(until(lambda r=r: read(tmp_path / f"pid{r}"))) for r in range(3)]  # type: ignore[misc]
    job.send_signal(signal.SIGSTOP)
    until(lambda: state_of(job.pid) == "T")
    for rank in (first, 1, 2 - first):
        (tmp_path / f"go{rank}").touch()
        until(lambda rank=rank: state_of(pids[rank]) == "Z")  # type: ignore[misc]
    job.send_signal(signal.SIGCONT)
    _, errors = job.communicate(timeout=30)
    assert job.returncode == 10 + first
    assert f"rank {first} exited with code {10 + first}" in errors


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def until(condition: Callable[[], Any], limit: float = 30.0) -> Any:
    """What ``condition`` returns, once that is true."""
    deadline = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def test_a_killed_rank_is_reported_by_its_signal(tmp_path: Path) -> None:
    text = """
import os, signal
if os.environ["RANK"] == "2":
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run("--nproc", "3", script(tmp_path, text))
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 2 was killed by SIGKILL" in done.stderr


def test_a_rank_that_ignores_everything_is_ended(tmp_path: Path) -> None:
    text = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(1, f"pid {os.getpid()}\\n".encode())  # one write, so that lines of two ranks cannot mix
if os.environ["RANK"] == "1":
    time.sleep(0.5)
    os._exit(3)
time.sleep(100)
"""
    done = run("--nproc", "2", script(tmp_path, text))
    assert done.returncode == 3
    pids = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(pids) == 2
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_launcher_ends_the_ranks(tmp_path: Path, number: signal.Signals) -> None:
    text = """
import os, time, pathlib, sys
pathlib.Path(sys.argv[1], f"pid{os.getpid()}").touch()
time.sleep(100)
"""
    command = ["--nproc", "2", script(tmp_path, text), str(tmp_path)]
    job = subprocess.Popen(
        [sys.executable, "-m", "hybridcomm.launch", *command],
        env={**os.environ, **ENV},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    deadline = time.monotonic() + 30
    while len(pids := [int(p.name[3:]) for p in tmp_path.glob("pid*")]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(number)
    assert job.wait(30) in (128 + number, -number)
    deadline = time.monotonic() + 10
    while [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, "ranks outlived the launcher"
        time.sleep(0.05)


@pytest.mark.parametrize("counts", [{"nproc": 0}, {"nproc": 2, "nodes": 3}, {"nproc": 2, "nodes": 0}])
def test_counts_that_do_not_fit(counts: dict[str, int]) -> None:
    with pytest.raises(UnsupportedError, match="--n"):
        launch(["-c", "pass"], **counts)


def test_usage_errors_are_one_line() -> None:
    done = run("--nproc", "2", "--nodes", "5", "script.py")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("python -m hybridcomm.launch: error: --nodes 5")
    assert run("--nproc", "2").returncode == 2
