"""The loop alone in one process: accumulation, skipped steps, the schedule, and where its time goes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from tests.numerics import gamma
from tests.train.builders import random_dataset
from train.backend import WholeModel
from train.batch import Packed
from train.config import OptimConfig, TrainConfig
from train.data import split_leave_one_out
from train.errors import EvaluationError, TrainError
from train.loop import Trainer
from train.optim import build_optimizer, learning_rate
from train.outcome import StepTimes
from train.replica import ModelSpec
from train.report import Reporter

DATA = random_dataset(30, 40)
MODEL = ModelConfig(dim=8, layers=1, heads=1, hidden=8, max_len=6, dropout=0.3)


class Alone(WholeModel):
    """A world of one rank that can pretend to be rank r of w, and to receive broken gradients."""

    def __init__(self, rank: int = 0, world_size: int = 1, broken_steps: tuple[int, ...] = ()) -> None:
        self.rank, self.world_size = rank, world_size
        self.broken_steps = broken_steps
        self.synced = self.rolled_back = 0
        self.gradients: list[torch.Tensor] = []

    def averaged(self) -> float:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        if self.synced in self.broken_steps:
            next(self.model.parameters()).grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
        self.synced += 1
        return 0.0

    def rollback(self) -> None:
        self.rolled_back += 1


def trainer(backend: WholeModel, **settings: Any) -> Trainer:
    config = TrainConfig(**{"epochs": 1, "batch_size": 8, "model": MODEL, **settings})
    parameters = backend.build(ModelSpec(config=config.model, num_items=DATA.num_items))
    return Trainer(
        config, data=DATA, split=split_leave_one_out(DATA), backend=backend, parameters=parameters,
        optimizer=build_optimizer(parameters, config.optim), reporter=Reporter(config, None, active=False),
    )  # fmt: skip


class MeanOfMeans(Alone):
    """The planted bug: each microbatch is divided by its own predictions, and what is left by their number."""

    def step(self, batches: Sequence[Packed], scale: float, times: StepTimes) -> float:
        filled = [batch for batch in batches if len(batch.targets)]
        if not filled:
            return super().step(batches, scale, times)
        total = 0.0
        for batch in filled:
            total += super().step([batch], 1 / len(batch.targets) / len(filled), times)
        if len(filled) > 1:  # each call has noted what had been added up so far
            self.gradients[-len(filled) :] = self.gradients[-1:]
        return total


UNMOVED = OptimConfig(lr=1e-30, warmup_steps=0)
"""Weights stay as they are, so each step's gradient is that of the first weights."""


@cache
def gradients(
    microbatches: int = 1, rank: int = 0, world_size: int = 1, kind: type[Alone] = Alone, negatives: int = 0
) -> list[torch.Tensor]:
    """Of each step of an epoch, the last of which has fewer users."""
    comm = kind(rank, world_size)
    run = trainer(comm, microbatches=microbatches, optim=UNMOVED, negatives=negatives)
    assert len(run._users) % 8
    with contextlib.suppress(
        EvaluationError
    ):  # the evaluation of a part of the users refuses, after the steps
        run.run()
    assert len(comm.gradients) == run.total_steps == -(-len(run._users) // 8)
    return comm.gradients


def mean_over(world_size: int, kind: type[Alone] = Alone, negatives: int = 0) -> list[torch.Tensor]:
    ranks = [
        gradients(rank=rank, world_size=world_size, kind=kind, negatives=negatives)
        for rank in range(world_size)
    ]
    return [torch.stack(step).mean(0) for step in zip(*ranks, strict=True)]


def excess(found: Sequence[torch.Tensor], whole: Sequence[torch.Tensor]) -> list[float]:
    """By step, how far gradients lie apart, in tolerances."""
    return [
        float((one - other).abs().max()) / tolerance(other) for one, other in zip(found, whole, strict=True)
    ]


def tolerance(gradient: torch.Tensor) -> float:
    """Sums over at most 8 users of 6 predictions, each through a network of some 200 roundings."""
    return gamma(8 * 6 + 200, "float32") * float(gradient.abs().max()) * 8


@pytest.mark.parametrize("microbatches", [2, 3, 8, 11])
def test_microbatches_do_not_change_the_gradient(microbatches: int) -> None:
    """In no step: uneven microbatches, empty ones, and the ragged last batch."""
    assert max(excess(gradients(microbatches), gradients())) <= 1


@pytest.mark.parametrize("microbatches", [2, 3])
def test_control_a_mean_of_microbatches_means_is_noticed(microbatches: int) -> None:
    *full, _ = excess(gradients(microbatches, kind=MeanOfMeans), gradients())  # the last step has one user
    assert min(full) > 1


@pytest.mark.parametrize("world_size", [2, 3, 4, 11])
def test_the_mean_over_ranks_is_the_gradient_of_one_process(world_size: int) -> None:
    assert max(excess(mean_over(world_size), gradients())) <= 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_control_a_mean_of_ranks_means_is_noticed(world_size: int) -> None:
    assert min(excess(mean_over(world_size, MeanOfMeans), gradients())) > 1


def test_drawn_items_do_not_depend_on_who_computes() -> None:
    """But on the step, so microbatches and replicas score against the same; all items are the full softmax."""
    few = gradients(negatives=9)
    assert max(excess(gradients(3, negatives=9), few)) <= 1
    assert max(excess(mean_over(3, negatives=9), few)) <= 1
    assert max(excess(gradients(negatives=DATA.num_items), gradients())) <= 1
    assert min(excess(few, gradients())) > 1


def test_each_step_draws_anew() -> None:
    run = trainer(Alone(), negatives=9)
    users = next(run._epoch_steps(0))
    first, again = (run._batches(users)[0].negatives for _ in range(2))
    run.outcome.steps += 1
    later = run._batches(users)[0].negatives
    assert first is not None
    assert again is not None
    assert later is not None
    assert torch.equal(first.items, again.items)
    assert not torch.equal(first.items, later.items)


@pytest.mark.filterwarnings("error")
def test_without_a_prediction_there_is_no_mean_loss() -> None:
    run = trainer(Alone())
    run.outcome.loss = 1.0
    with contextlib.suppress(Exception):  # the evaluation of an untrained model is of no interest here
        run._validate(1)
    assert np.isnan(run.outcome.loss)


def test_a_step_that_is_not_finite_is_skipped_and_rolled_back() -> None:
    comm = Alone(broken_steps=(1, 2))
    run = trainer(comm, max_steps=4)
    before = [p.detach().clone() for p in run._parameters]
    outcome = run.run()
    assert (outcome.skipped, comm.rolled_back, outcome.steps) == (2, 2, 4)
    assert all(torch.isfinite(p).all() for p in run._parameters)
    assert any(not torch.equal(p, q) for p, q in zip(before, run._parameters, strict=True))


def test_nothing_but_broken_steps_ends_the_run() -> None:
    with pytest.raises(TrainError, match="20 steps in a row"):
        trainer(Alone(broken_steps=tuple(range(99))), epochs=50).run()


def test_times_add_up_and_the_best_weights_are_tested() -> None:
    run = trainer(Alone(), epochs=3, eval_every=1)
    outcome = run.run()
    times = outcome.times
    assert times.known + times.other == pytest.approx(times.total)
    assert times.other >= 0
    assert outcome.samples == 3 * len(run._users)
    assert 1 <= outcome.best_epoch <= 3
    assert run._best is not None
    assert all(
        torch.equal(value, run._best[name]) for name, value in run._backend.module.state_dict().items()
    )


def test_learning_rate_warms_up_and_decays() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule="linear", final_lr=0.1)
    assert learning_rate(config, 0, 100) == pytest.approx(0.1)
    assert learning_rate(config, 99, 100) == pytest.approx(0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert max(rates) < 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    constant = OptimConfig(lr=1.0, warmup_steps=0, schedule="constant")
    assert {learning_rate(constant, step, 50) for step in range(50)} == {1.0}
    cosine = OptimConfig(lr=1.0, warmup_steps=0, schedule="cosine", final_lr=0.0)
    assert learning_rate(cosine, 50, 101) == pytest.approx(0.5)
