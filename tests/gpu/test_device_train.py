"""The training stack on simulated GPUs: ``train.run``'s backend and the Reducer, and the CPU's bits after each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from hybridcomm.topology import Topology
from model.config import ModelConfig
from tests.gpu.device_ranks import Rank, run_devices
from tests.gpu.simulated_torch import SimulatedTorch
from train.backend_hybrid import HybridBackend
from train.batch import Packed, train_batch
from train.config import TrainConfig
from train.data import split_leave_one_out
from train.errors import ConfigError
from train.optim import build_optimizer
from train.outcome import StepTimes
from train.replica import ModelSpec
from train.synthetic import SyntheticConfig, generate

pytestmark = pytest.mark.xdist_group("gpu-engine")

STEPS = 20
DATA = generate(SyntheticConfig(users=200, items=300))
SPLIT = split_leave_one_out(DATA)
CONFIG = TrainConfig(model=ModelConfig(dim=32, layers=2, max_len=16, dropout=0.1), compress="topk:0.01")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class OnSimulatedGpu(HybridBackend):
    """What a GPU computes in the order of its stream, the host computes here: it waits for the stream before."""

    torch: SimulatedTorch

    def step(self, batches: Sequence[Packed], scale: float, times: StepTimes) -> float:
        loss = super().step(batches, scale, times)
        self.torch.synchronize()
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                self.torch.reads(parameter.grad, "optimizer")
            self.torch.writes(parameter.data, "optimizer")
        return loss


def train(backend: HybridBackend, config: TrainConfig) -> list[torch.Tensor]:
    """Parameters after each step; steps 4, 9, ... are refused, as one with gradients that are not finite would be."""
    spec = ModelSpec(config=config.model, num_items=DATA.num_items, seed=3)
    parameters = backend.build(spec)
    generator = torch.Generator().manual_seed(3)  # torch's own serves all ranks, which are threads
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    optimizer = build_optimizer(backend.updated(), config.optim)
    backend.attach(optimizer)
    backend.module.train()
    seen = []
    for step in range(STEPS):
        users = np.arange(step * 8, step * 8 + 8) % 200
        own = users[backend.replica :: backend.replicas]
        batch = train_batch(DATA, SPLIT, own, config.model.max_len, seed=0, step=step)
        for parameter in parameters:
            parameter.grad = None
        backend.step([batch], 0.01, StepTimes())
        if step % 5 == 4:
            backend.rollback()
        else:
            assert torch.isfinite(backend.gradient_norm())
            optimizer.step()
        seen.append(torch.cat([p.detach().flatten().clone() for p in parameters]))
    for reducer in backend.held.runtime.all_reducers():
        reducer.close()  # its hooks would keep it, and its buckets, as long as the parameters
    return seen


@pytest.mark.parametrize("compress", ["topk:0.01", "int8"])
def test_a_training_gives_the_cpus_bits(compress: str) -> None:
    config = CONFIG.model_copy(update={"compress": compress})

    def body(rank: Rank) -> list[int]:
        wanted = train(HybridBackend(config, rank.host), config)
        backend = OnSimulatedGpu(config, rank.device)
        backend.torch = rank.torch
        found = train(backend, config)
        return [step for step, pair in enumerate(zip(wanted, found, strict=True)) if not torch.equal(*pair)]

    results, reports = run_devices(Topology.virtual(2, 2), body, seed=4, eager_percent=60, flat=False)
    assert results == [[]] * 4
    assert reports == []


@pytest.mark.parametrize(
    "options", [{"pp": 2}, {"tp": 2}, {"zero": 1}, {"comm": "ddp", "compress": "none"}, {"emulate": 0.1}]
)
def test_what_does_not_go_with_gpus_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, ValueError), match=r"cuda|GPU"):
        TrainConfig(device="cuda", **options)
