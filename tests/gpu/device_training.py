"""A training on simulated GPUs beside the same on the host: parameters after each step, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from hybridcomm.reducer import Reducer
from hybridcomm.topology import Topology
from model.parts import Part
from model.recommender import Recommender
from tests.gpu.device_ranks import Rank, run_devices
from tests.gpu.host_computed import HostComputed
from tests.gpu.simulated_torch import SimulatedTorch
from train.backend_hybrid import HybridBackend
from train.batch import Packed, train_batch
from train.config import TrainConfig
from train.data import split_leave_one_out
from train.evaluate import evaluate_model
from train.optim import build_optimizer
from train.outcome import StepTimes
from train.replica import ModelSpec, Replica
from train.synthetic import SyntheticConfig, generate

__all__ = ["OnSimulatedGpu", "compared", "train"]

DATA = generate(SyntheticConfig(users=200, items=300))
SPLIT = split_leave_one_out(DATA)
USERS = 8
"""Of all ranks in a step."""


class OnSimulatedGpu(HybridBackend):
    """What a GPU computes in the order of its stream, the host computes here: it waits for the stream before."""

    torch: SimulatedTorch

    def build(self, spec: ModelSpec) -> Sequence[nn.Parameter]:
        parameters = super().build(spec)
        for reducer in self.held.runtime.all_reducers():
            self._watch(reducer)
        complete = self.held.complete

        def behind_the_buckets(times: StepTimes) -> None:
            self.torch.synchronize()
            complete(times)

        self.held.complete = behind_the_buckets  # type: ignore[method-assign]
        return parameters

    def _watch(self, reducer: Reducer) -> None:
        """Gradients that were put off are complete when the reducer is told, and no hook has seen them."""
        ready = reducer.ready

        def told(parameter: nn.Parameter) -> None:
            self.torch.made(parameter)
            ready(parameter)

        reducer.ready = told  # type: ignore[method-assign]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        super().attach(optimizer)
        optimizer.register_step_post_hook(
            lambda *_: self.torch.synchronize()
        )  # parameters that come from others

    def step(self, batches: Sequence[Packed], scale: float, times: StepTimes) -> float:
        loss = super().step(batches, scale, times)
        self.torch.synchronize()
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                self.torch.reads(parameter.grad, "optimizer")
            self.torch.writes(parameter.data, "optimizer")
        return loss


def train(backend: HybridBackend, config: TrainConfig, steps: int) -> list[torch.Tensor]:
    """Parameters after each step, and metrics; steps 4, 9, ... are refused, as one with gradients that are not
    finite would be."""
    spec = ModelSpec(config=config.model, num_items=DATA.num_items, seed=3)
    parameters = backend.build(spec)
    optimizer = build_optimizer(backend.updated(), config.optim)
    backend.attach(optimizer)
    backend.module.train()
    seen = []
    for step in range(steps):
        users = np.arange(step * USERS, (step + 1) * USERS) % 200
        own = np.array_split(users[backend.replica :: backend.replicas], config.pieces)
        batches = [train_batch(DATA, SPLIT, each, config.model.max_len, seed=0, step=step) for each in own]
        for parameter in parameters:
            parameter.grad = None
        backend.step(batches, 0.01, StepTimes())
        if step % 5 == 4:
            backend.rollback()
        else:
            assert torch.isfinite(backend.gradient_norm())
            optimizer.step()
        seen.append(torch.cat([p.detach().flatten().clone() for p in parameters]))
    metrics = evaluate_model(backend, DATA, SPLIT, config.model.max_len, which="validation")
    seen.append(torch.tensor([metrics.hr, metrics.ndcg, metrics.users]))
    for reducer in backend.held.runtime.all_reducers():
        reducer.close()  # its hooks would keep it, and its buckets, as long as the parameters
    return seen


@contextmanager
def _same_every_time() -> Iterator[None]:
    """Ranks, which are threads, draw weights from torch's one generator: one after the other. Products of matrices in
    several threads may differ in the last bit: so in one."""
    building, real = threading.Lock(), Replica._make

    def make(self: Replica, spec: ModelSpec, part: Part) -> Recommender:
        with building:
            return real(self, spec, part)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch.object(Replica, "_make", make):
            yield
    finally:
        torch.set_num_threads(before)


def compared(
    config: TrainConfig, topology: Topology, *, steps: int, **options: Any
) -> tuple[list[Any], list[str]]:
    """By rank, the steps after which parameters (or metrics in the end) are not the host's, or an error; and what the
    simulation reported."""

    def body(rank: Rank) -> list[int]:
        wanted = train(HybridBackend(config, rank.host), config, steps)
        backend = OnSimulatedGpu(config, rank.device)
        backend.torch = rank.torch
        found = train(backend, config, steps)
        return [step for step, pair in enumerate(zip(wanted, found, strict=True)) if not torch.equal(*pair)]

    with _same_every_time():
        return run_devices(
            topology, body, **{"kind": HostComputed, "eager_percent": 60, "flat": False, **options}
        )
