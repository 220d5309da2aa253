"""Whole trainings on ranks that are threads: data, backend, optimizer and loop, as in the command."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridcomm.context import Context
from hybridcomm.topology import Topology
from model.config import ModelConfig
from model.parts import Part
from model.recommender import Recommender
from tests.engine_ranks import engine_contexts
from tests.ranks import run_ranks
from tests.train.builders import random_dataset
from train.backend import Backend
from train.backend_hybrid import HybridBackend
from train.config import TrainConfig
from train.data import split_leave_one_out
from train.loop import Trainer
from train.optim import build_optimizer
from train.outcome import Outcome
from train.replica import ModelSpec, Replica
from train.report import Reporter

DATA = random_dataset(30, 40)
MODEL = ModelConfig(dim=12, layers=2, heads=2, hidden=10, max_len=6, dropout=0.3, init_std=0.3)
_BUILDING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a rank has in the end; ``state``: the optimizer's tensors, but for its counters of steps."""

    outcome: Outcome
    weights: dict[str, Tensor]
    gradients: list[Tensor]
    state: list[Tensor]


def settings(**changes: Any) -> TrainConfig:
    """A tiny run of three steps, dense."""
    tiny = {"epochs": 1, "batch_size": 8, "max_steps": 3, "compress": "none", "model": MODEL}
    return TrainConfig(**{**tiny, **changes})


def train(backend: Backend, config: TrainConfig, built: Callable[[], object] = lambda: None) -> Trained:
    """One rank's whole run; ``built`` is called when the model is there."""
    features = torch.randn(DATA.num_items, 5, generator=torch.Generator().manual_seed(3))
    spec = ModelSpec(
        config=config.model, num_items=DATA.num_items, features=features, seed=config.seed,
        computing=config.computing,
    )  # fmt: skip
    parameters = backend.build(spec)
    built()
    optimizer = build_optimizer(backend.updated(), config.optim)
    trainer = Trainer(
        config, data=DATA, split=split_leave_one_out(DATA), backend=backend, parameters=parameters,
        optimizer=optimizer, reporter=Reporter(config, None, active=False),
    )  # fmt: skip
    outcome = trainer.run()
    return Trained(
        outcome=outcome,
        weights={name: value.clone() for name, value in backend.module.state_dict().items()},
        gradients=[p.grad.clone() for p in parameters if p.grad is not None],
        state=[t for kept in optimizer.state.values() for name, t in kept.items() if name != "step"],
    )


def trained(
    topology: Topology,
    config: TrainConfig,
    make: Callable[[TrainConfig, Context], Backend] = HybridBackend,
    *,
    timeout: float = 60.0,
) -> list[Trained]:
    """`train` on each rank; models are made one after the other, and before any rank trains, since all draw from
    torch's one generator."""
    alone = Replica._make

    def one_by_one(replica: Replica, spec: ModelSpec, part: Part) -> Recommender:
        with _BUILDING:
            return alone(replica, spec, part)

    with pytest.MonkeyPatch.context() as patch, engine_contexts(topology, timeout=timeout) as contexts:
        patch.setattr(Replica, "_make", one_by_one)
        return run_ranks(
            lambda ctx: train(make(config, ctx), config, ctx.barrier), contexts, timeout=1.5 * timeout
        )
