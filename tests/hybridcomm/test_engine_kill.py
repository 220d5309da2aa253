"""Ranks as processes that are killed, stopped or interrupted: the others end soon, naming the culprit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.rank_processes import rank_processes

WORKER = """
import os, sys, time
import numpy as np
import hybridcomm
from hybridcomm.errors import HybridCommError

reads = int(os.environ["RANK"]) % 2 == 0  # the others' private memory: both ways, whatever this machine is faster at
ctx = hybridcomm.init(timeout=float(os.environ.get("TIMEOUT", "120")), single_copy=reads)
print("pid", os.getpid(), flush=True)
sizes = (10, 100_000, 1_500_000)
values = [np.ones(size, np.float32) for size in sizes]
residual = hybridcomm.Residual()
print("ready", flush=True)
begin = time.monotonic()
try:
    while True:
        begin = time.monotonic()
        ctx.allreduce(values[0])
        works = [ctx.allreduce(value, op="mean", async_op=True) for value in values]
        ctx.allreduce(values[1], op="mean", compress="topk:0.01", residual=residual)
        for work in works:
            work.wait()
except HybridCommError as error:
    named = getattr(error, "rank", getattr(error, "missing", None))
    print("ended", type(error).__name__, named, f"{time.monotonic() - begin:.3f}", error, flush=True)
    sys.exit(3)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    ctx.abort()
    sys.exit(4)
"""

WITHIN_S = 10.0
"""Every survivor has ended this long after a death: the guard of a busy machine, not a measurement."""


def ended(log: str) -> list[str]:
    lines = [line for line in log.splitlines() if line.startswith("ended")]
    assert len(lines) == 1, log
    return lines[0].split()


def shared_memory_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if "hybridcomm" in path.name}


def unix_sockets(pids: list[int]) -> dict[str, str]:
    """Inode -> state of the named unix sockets that the processes hold open; "01" is listening."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {row[6]: row[5] for row in rows if row[6] in inodes and "@hybridcomm" in row[-1]}


@pytest.mark.parametrize(("world", "nodes"), [(4, 2), (5, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_rank_is_named_by_all_others(world: int, nodes: int, seed: int) -> None:
    dice = random.Random(1000 * world + 10 * nodes + seed)
    victim, after_s = dice.randrange(world), dice.uniform(0.0, 0.6)
    files = shared_memory_files()
    with rank_processes(WORKER, world, nodes=nodes) as job:
        for rank in range(world):
            job.wait_for(rank, "ready")
        time.sleep(after_s)
        job.processes[victim].send_signal(signal.SIGKILL)
        codes = job.wait(WITHIN_S)
        assert codes.pop(victim) == -signal.SIGKILL
        assert codes == [3] * (world - 1), [job.log(rank) for rank in range(world)]
        for rank in set(range(world)) - {victim}:
            _, kind, named, *_ = ended(job.log(rank))
            assert (kind, named) == ("PeerLostError", str(victim)), job.log(rank)
        pids = [process.pid for process in job.processes]
    assert shared_memory_files() == files
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_segments_have_no_name_and_sockets_go_with_the_bootstrap() -> None:
    """What kill -9 cannot leave behind because it never has a name; the listeners' names end with init()."""
    with rank_processes(WORKER, 4, nodes=2) as job:
        for rank in range(4):
            job.wait_for(rank, "ready")
        sockets = unix_sockets([process.pid for process in job.processes])
        assert sockets, "the control: accepted connections are seen"
        assert "01" not in sockets.values(), "a listener outlived the bootstrap"
        for process in job.processes:
            process.kill()
        job.wait(WITHIN_S)
        left = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
        assert not left & set(sockets)
    assert shared_memory_files() == set()


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_stopped_rank_is_named_after_the_timeout(nodes: int) -> None:
    victim = 3
    with rank_processes(WORKER, 4, nodes=nodes, env={"TIMEOUT": "1.5"}) as job:
        for rank in range(4):
            job.wait_for(rank, "ready")
        job.processes[victim].send_signal(signal.SIGSTOP)
        codes = job.wait(20, but=[victim])
        assert codes[:victim] == [3] * 3
        for rank in range(victim):
            _, kind, named, *_ = ended(job.log(rank))
            assert (kind, named) == ("StallError", f"({victim},)"), job.log(rank)
        job.processes[victim].send_signal(signal.SIGCONT)
        assert job.wait(WITHIN_S)[victim] == 3, "the stopped rank must learn that the others gave up"


@pytest.mark.parametrize("nodes", [1, 2])
def test_interrupt_ends_a_blocking_wait_and_the_peers(nodes: int) -> None:
    """Rank 0 waits in a blocking call for rank 3, which sleeps: Ctrl-C on rank 0 ends all of them."""
    script = WORKER.replace("    while True:", "    time.sleep(30 if ctx.rank == 3 else 0)\n    while True:")
    with rank_processes(script, 4, nodes=nodes) as job:
        for rank in range(4):
            job.wait_for(rank, "ready")
        time.sleep(0.3)
        begin = time.monotonic()
        job.processes[0].send_signal(signal.SIGINT)
        codes = job.wait(WITHIN_S, but=[3])
        assert time.monotonic() - begin < WITHIN_S
        assert "interrupted" in job.log(0), job.log(0)
        assert codes[0] == 4
        for rank in (1, 2):
            _, kind, *_ = ended(job.log(rank))
            assert kind == "AbortedError", job.log(rank)
            assert "rank 0" in job.log(rank)


def test_control_survivors_of_a_quiet_job_do_not_end() -> None:
    """Negative control: without a kill nobody ends, so the tests above do not pass by accident."""
    with rank_processes(WORKER, 3, nodes=2) as job:
        for rank in range(3):
            job.wait_for(rank, "ready")
        time.sleep(1.0)
        assert [process.poll() for process in job.processes] == [None] * 3


def test_more_ranks_than_cores_make_progress() -> None:
    """1000 small calls of 8 ranks on 2 cores; the test's timeout is the guard against a collapse."""
    script = """
import numpy as np, hybridcomm, os
os.sched_setaffinity(0, set(list(os.sched_getaffinity(0))[:2]))
ctx = hybridcomm.init(timeout=60)
value = np.ones(64, np.float32)
for _ in range(1000):
    value[:] = ctx.rank
    ctx.allreduce(value)
    assert value[0] == 28
print("done")
"""
    with rank_processes(script, 8, nodes=2) as job:
        assert job.wait(100) == [0] * 8, [job.log(rank) for rank in range(8)]
