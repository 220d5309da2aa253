"""A team of ranks on this host for microbenchmarks: this process is rank 0, the others follow its commands.

For each benchmark rank 0 tells the others (peer, size, calls); then all make the same number of calls, each
with its input rewritten before. Small messages are timed in batches, back to back, because no barrier is as
short as they are; large ones start from a barrier in shared memory.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import hybridcomm
from benchmarks.peers import integers

__all__ = ["PEERS", "Case", "Team"]

PEERS = ("gloo", "hybridcomm", "hybridcomm.empty")
"""gloo; ours on a private tensor; ours on a tensor in shared memory."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One benchmark: ``nbytes`` of fp32, ``batch`` calls in each of ``rounds`` timed batches."""

    peer: str
    nbytes: int
    batch: int
    rounds: int
    warmup: int = 2

    @classmethod
    def of(cls, peer: str, nbytes: int) -> Case:
        """Fixed counts that keep every case near a second."""
        batch = max(1, min(100, (4 << 20) // nbytes))
        return cls(peer=peer, nbytes=nbytes, batch=batch, rounds=21 if nbytes < 32 << 20 else 9)


_PATIENCE_S = 60


class _Barrier:
    """All ranks leave together, by counters in shared memory: less skew than gloo's barrier."""

    def __init__(self, file: int, rank: int, world_size: int) -> None:
        self._counts = np.frombuffer(mmap.mmap(file, 64 * world_size), np.int64)[::8]
        self._rank = rank

    def wait(self) -> None:
        """Return when every rank has called as often as this one; TimeoutError names those that have not."""
        turn = self._counts[self._rank] + 1
        self._counts[self._rank] = turn
        deadline = time.monotonic() + _PATIENCE_S
        while self._counts.min() < turn:
            os.sched_yield()
            if time.monotonic() > deadline:
                missing = np.flatnonzero(self._counts < turn).tolist()
                raise TimeoutError(f"ranks {missing} did not come to the barrier within {_PATIENCE_S} s")


class Runner:
    """One rank's part of one case."""

    def __init__(self, case: Case, barrier: _Barrier) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        numel = case.nbytes // 4
        self.case = case
        self._barrier = barrier
        self._own = integers(numel, rank)
        self._expected = torch.stack([integers(numel, other) for other in range(world)]).sum(0)
        shared = case.peer == "hybridcomm.empty"
        self._tensor = hybridcomm.empty(numel, dtype=torch.float32) if shared else torch.empty(numel)
        self._call = self._calls()[case.peer]
        self._from, self._to = self._own.numpy(), self._tensor.numpy()

    def _calls(self) -> dict[str, Callable[[], Any]]:
        tensor, context = self._tensor, hybridcomm.default_context()
        ours = functools.partial(context.allreduce, tensor)
        return {"gloo": lambda: dist.all_reduce(tensor), "hybridcomm": ours, "hybridcomm.empty": ours}

    def prepare(self) -> None:
        """Before a batch, not timed: the first input, and all ranks together."""
        np.copyto(self._to, self._from)
        self._barrier.wait()

    def batch(self) -> None:
        """Timed: the calls, each on a rewritten input (the first was written by ``prepare``)."""
        self._call()
        for _ in range(self.case.batch - 1):
            np.copyto(self._to, self._from)
            self._call()

    def check(self) -> None:
        """The last result, exactly."""
        if not torch.equal(self._tensor, self._expected):
            raise AssertionError(f"{self.case}: wrong sum on rank {dist.get_rank()}")

    def rewriting(self) -> float:
        """Seconds of the rewriting inside one batch, to be taken off: that of all ranks which share a core."""
        if self.case.batch == 1:
            return 0.0
        times = []
        for _ in range(self.case.rounds):
            begin = time.perf_counter()
            for _ in range(self.case.batch - 1):
                np.copyto(self._to, self._from)
            times.append(time.perf_counter() - begin)
        return float(np.median(times)) * max(dist.get_world_size() / len(os.sched_getaffinity(0)), 1.0)

    def follow(self) -> None:
        """What a rank other than 0 does."""
        for _ in range(self.case.rounds + self.case.warmup):
            self.prepare()
            self.batch()
        self.check()


class Team:
    """Rank 0 with its followers, one thread each; close it when done."""

    def __init__(self, world_size: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        file = os.memfd_create("inhost-barrier")
        os.ftruncate(file, 64 * world_size)
        common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "INHOST_BARRIER": str(file)}
        self._saved = dict(os.environ)
        self._followers = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.inhost"],
                env={**os.environ, **common, "RANK": str(rank)},
                stdin=subprocess.PIPE,
                text=True,
                pass_fds=[file],
            )
            for rank in range(1, world_size)
        ]
        os.environ.update({**common, "RANK": "0"})
        self._barrier = _join()
        self.world_size = world_size

    def start(self, case: Case) -> Runner:
        """Tell the followers, who begin at once; returns rank 0's part."""
        for follower in self._followers:
            assert follower.stdin is not None
            print(json.dumps(vars(case)), file=follower.stdin, flush=True)
        return Runner(case, self._barrier)

    def close(self) -> None:
        """End the followers; leave both process groups."""
        for follower in self._followers:
            assert follower.stdin is not None
            follower.stdin.close()
        _leave()
        for follower in self._followers:
            follower.wait(timeout=30)
        os.environ.clear()
        os.environ.update(self._saved)


def _join() -> _Barrier:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    hybridcomm.init(hybridcomm.Topology.virtual(1, dist.get_world_size()))
    return _Barrier(int(os.environ["INHOST_BARRIER"]), dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    hybridcomm.shutdown()
    dist.destroy_process_group()


def main() -> None:
    """A follower: cases come as JSON lines until the pipe closes."""
    barrier = _join()
    for line in sys.stdin:
        Runner(Case(**json.loads(line)), barrier).follow()
    _leave()


if __name__ == "__main__":
    main()
