"""The whole self-test on simulated GPUs: the code that runs on real ones, its ranks being threads."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hybridcomm.bootstrap import World
from hybridcomm.selftest.engine import Options, conduct
from hybridcomm.store import DirectoryStore
from tests.engine_ranks import each_rank
from tests.gpu.simulated import Simulation
from tests.gpu.simulated_torch import SimulatedTorch
from tests.gpu.simulation import library

__all__ = ["Outcome", "SimulatedGpu", "own_allreduce", "selftest"]


class SimulatedGpu(SimulatedTorch):
    """As the self-test asks. Its times are the host's, which are no device's."""

    name = "simulated GPU"

    def mark(self) -> float:
        self.synchronize()
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """``codes``: by rank, an exception where one got out; ``report``: rank 0's; ``simulated``: the simulation's."""

    codes: list[Any]
    report: str
    simulated: list[str]


def selftest(
    world_size: int,
    options: Options,
    *,
    seed: int = 1,
    eager_percent: int = 60,
    ranks: Callable[[int], bool] = lambda _: True,
    limit: float = 100.0,
    kernels: tuple[int, str] | None = None,
) -> Outcome:
    """Runs it on ``world_size`` ranks, of which those come of whom ``ranks`` says so."""
    os.environ["HYBRIDCOMM_CUDA"] = os.environ["HYBRIDCOMM_NCCL"] = str(library())
    simulation = Simulation(
        seed=seed, eager_percent=eager_percent, threads=sum(map(ranks, range(world_size)))
    )
    simulation.register_shipped_kernels()
    simulation.nccl_version(21805)
    gpus: list[SimulatedGpu] = []
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="hybridcomm-test-") as directory, simulation:
        if options.watch:
            simulation.share_hosts()  # the watchdog's thread may be who has seen that a work is done

        def body(rank: int) -> int | None:
            if not ranks(rank):
                return None
            gpu = SimulatedGpu(simulation, rank)
            gpus.append(gpu)
            world = World(rank=rank, world_size=world_size, store=DirectoryStore(directory))
            try:
                return conduct(world, gpu, options, peer=own_allreduce, kernels=kernels, out=said.append)
            finally:
                gpu.close()
                simulation.publish()

        codes = each_rank(body, world_size, limit=limit)
        simulation.learn()
        gc.collect()
        reports = simulation.finish()
        for gpu in gpus:
            gpu.over = True
    return Outcome(codes=codes, report="".join(said), simulated=reports)


@contextmanager
def own_allreduce(*_: object) -> Iterator[Callable[[torch.Tensor], None]]:
    """In place of a peer: nothing is summed, and nobody looks."""
    yield lambda tensor: None
