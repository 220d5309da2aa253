"""What each rank of ``bench_overlap`` runs: a backward of known length that launches a bucket after each of its parts.

Rank 0 prints one JSON line per peer. Times are those of the slowest rank, medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

import hybridcomm
from benchmarks.peers import integers
from benchmarks.timing import slowest

_WIDTH = 192  # of the matrices that are multiplied: three of them stay in the caches
_PROBE = 200  # multiplications whose time says how many make up a backward


class Backward:
    """Multiplies matrices; ``part()`` does one share of all the work."""

    def __init__(self, parts: int) -> None:
        self._left, self._right = torch.rand(_WIDTH, _WIDTH), torch.rand(_WIDTH, _WIDTH)
        self._out = torch.empty(_WIDTH, _WIDTH)
        self._parts, self._count = parts, _PROBE

    def part(self) -> None:
        """One share of the work."""
        for _ in range(self._count):
            torch.mm(self._left, self._right, out=self._out)

    def last(self, seconds: float) -> None:
        """From now on all parts together take about ``seconds`` on the rank that is slowest."""
        self._count = _PROBE
        self.part()
        taken = slowest([_timed(self.part) for _ in range(5)])
        self._count = max(1, round(_PROBE * seconds / self._parts / min(taken)))


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class Run:
    """Buckets of integers, all-reduced by ``launch`` (tensor -> handle with ``wait``)."""

    def __init__(self, name: str, launch: Callable[[torch.Tensor], Any], *, buckets: int, numel: int) -> None:
        self.name, self._launch = name, launch
        world = dist.get_world_size()
        self._own = integers(numel, dist.get_rank())
        self._expected = torch.stack([integers(numel, rank) for rank in range(world)]).sum(0)
        self._tensors = [torch.empty(numel) for _ in range(buckets)]
        self.backward = Backward(buckets)

    def rewrite(self) -> None:
        """Before each timed round."""
        for place, tensor in enumerate(self._tensors):
            torch.mul(self._own, float(place + 1), out=tensor)
        dist.barrier()

    def communicate(self) -> None:
        """All buckets, with no computation beside them."""
        for work in [self._launch(tensor) for tensor in self._tensors]:
            work.wait()

    def compute(self) -> None:
        """The backward alone."""
        for _ in self._tensors:
            self.backward.part()

    def overlap(self) -> None:
        """Each bucket leaves when its part of the backward is done."""
        works = []
        for tensor in self._tensors:
            self.backward.part()
            works.append(self._launch(tensor))
        for work in works:
            work.wait()

    def check(self) -> None:
        """Exact sums."""
        for place, tensor in enumerate(self._tensors):
            if not torch.equal(tensor, self._expected * float(place + 1)):
                raise AssertionError(f"{self.name}: wrong sum in bucket {place}")

    def times(self, what: Callable[[], None], rounds: int, *, sums: bool = True) -> tuple[float, float]:
        """(wall seconds of the slowest rank, CPU seconds of this one), medians."""
        walls, processors = [], []
        for _ in range(rounds):
            self.rewrite()
            before = time.process_time()
            walls.append(_timed(what))
            processors.append(time.process_time() - before)
            if sums:
                self.check()
        return statistics.median(slowest(walls)), statistics.median(slowest(processors))


def _measure(run: Run, rounds: int) -> dict[str, float | str]:
    run.times(run.communicate, 1)  # connections, programs, memory
    communication, communication_cpu = run.times(run.communicate, rounds)
    run.backward.last(communication)
    compute, _ = run.times(run.compute, rounds, sums=False)
    overlapped, _ = run.times(run.overlap, rounds)
    return {
        "peer": run.name,
        "communication_s": communication,
        "communication_cpu_s": communication_cpu,
        "compute_s": compute,
        "overlapped_s": overlapped,
    }


def _runs(names: Sequence[str], buckets: int, numel: int) -> list[Run]:
    context = hybridcomm.default_context()
    launches = {
        "gloo": lambda tensor: dist.all_reduce(tensor, async_op=True),
        "hybridcomm": lambda tensor: context.allreduce(tensor, async_op=True),
    }
    return [Run(name, launches[name], buckets=buckets, numel=numel) for name in names]


def main() -> None:
    """Measure every peer; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", required=True)
    parser.add_argument("--buckets", type=int, required=True)
    parser.add_argument("--mib", type=float, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    hybridcomm.init()
    for run in _runs(arguments.peers.split(","), arguments.buckets, round(arguments.mib * 2**18)):
        line = _measure(run, arguments.rounds)
        if dist.get_rank() == 0:
            print(json.dumps(line), flush=True)
    hybridcomm.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
