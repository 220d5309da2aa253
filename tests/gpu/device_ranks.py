"""Ranks with a simulated GPU each, as threads of one process: host contexts are real, driver and NCCL are not."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any, TypeVar

from hybridcomm.device_context import DeviceContext
from hybridcomm.selftest.rank import Rank, gradient
from hybridcomm.topology import Topology
from tests.engine_ranks import TIMEOUT_S, engine_contexts
from tests.gpu.simulated import Simulation
from tests.gpu.simulated_torch import SimulatedTorch
from tests.gpu.simulation import library
from tests.ranks import run_ranks

__all__ = ["Rank", "gradient", "run_devices"]

T = TypeVar("T")

NCCL = 21805
"""The oldest that is supported: nothing beyond 2.18."""


def run_devices(
    topology: Topology,
    body: Callable[[Rank], T],
    *,
    seed: int = 1,
    eager_percent: int = 50,
    timeout: float = 60.0,
    stall_s: float = TIMEOUT_S,
    nccl: int = NCCL,
    patience_ms: int | None = None,
    return_exceptions: bool = False,
    connect: bool = True,
    kind: type[DeviceContext] = DeviceContext,
    **options: Any,
) -> tuple[list[T], list[str]]:
    """``body`` on every rank; (results by rank, what the simulation reported). ``options``: of `DeviceContext.connect`.

    ``connect``: else the body does that, or nobody. ``stall_s``: the contexts' timeout; ``nccl``: the version that is
    simulated; ``patience_ms``: `Simulation.patience`.
    """
    os.environ["HYBRIDCOMM_CUDA"] = os.environ["HYBRIDCOMM_NCCL"] = str(library())
    world = topology.world_size
    with engine_contexts(topology, timeout=stall_s) as contexts:
        simulation = Simulation(seed=seed, eager_percent=eager_percent, threads=world)
        simulation.register_shipped_kernels()
        simulation.nccl_version(nccl)
        if patience_ms is not None:
            simulation.patience(patience_ms)
        providers: list[SimulatedTorch] = []

        def ranked(host: Any) -> T:
            provider = SimulatedTorch(simulation, host.rank)
            providers.append(provider)
            if connect:
                host.device = kind.connect(host, provider, **{"watch": 0, **options})
            try:
                return body(Rank(host=host, device=host.device, torch=provider))
            finally:
                host.close_device()
                provider.close()
                simulation.publish()

        with simulation:
            if options.get("watch"):
                simulation.share_hosts()  # what the watchdog has seen the end of, the rank's thread may free
            results = run_ranks(ranked, contexts, timeout=timeout, return_exceptions=return_exceptions)
            simulation.learn()  # what the ranks have waited for, before their tensors give device memory back
            gc.collect()
            reports = simulation.finish()
            for provider in providers:
                provider.over = True
            return results, reports
