"""The training loop: steps, validations, the best weights, and where the time goes.

Every rank runs the same steps. The loss of a step is the sum over its predictions divided once by their
global number, which each rank knows without asking, so the averaged gradient does not depend on the
number of ranks or microbatches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from model.vocab import draw_negatives
from train.backend import Backend
from train.batch import Packed, epoch_order, rank_share, step_users, train_batch
from train.config import TrainConfig
from train.data import Dataset, Split
from train.errors import TrainError
from train.evaluate import Metrics, evaluate_model
from train.optim import learning_rate
from train.outcome import Outcome
from train.report import Reporter

__all__ = ["Trainer"]

_MAX_SKIPPED_IN_A_ROW = 20


class Trainer:
    """Trains the model that ``backend`` has built, whose ``parameters`` the optimizer updates; ``outcome`` fills."""

    def __init__(
        self, config: TrainConfig, *, data: Dataset, split: Split, backend: Backend,
        parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, reporter: Reporter,
    ) -> None:  # fmt: skip
        self._config, self._data, self._split, self._backend = config, data, split, backend
        self._parameters, self._optimizer, self._reporter = parameters, optimizer, reporter
        self._users = np.flatnonzero(split.train_ends >= 2)
        self._predictions = np.minimum(split.train_ends, config.model.max_len + 1) - 1
        steps = -(-len(self._users) // config.batch_size) * config.epochs
        self.total_steps = min(steps, config.max_steps) if config.max_steps else steps
        self._skipped_in_a_row = 0
        self._best: dict[str, torch.Tensor] | None = None
        self._loss, self._seen = 0.0, 0  # this rank's losses and the replica's predictions since a validation
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """All epochs, then the test of the weights that validated best."""
        self._backend.attach(self._optimizer)
        self._reporter.started(self._backend.describe(), self.total_steps)
        self._backend.module.train()
        for epoch in range(1, self._config.epochs + 1):
            for users in self._epoch_steps(epoch - 1):
                self._timed_step(users)
            done = self.outcome.steps >= self.total_steps
            if done or epoch == self._config.epochs or epoch % self._config.eval_every == 0:
                self._validate(epoch)
            if done:
                break
        if self._best is not None:
            self._backend.module.load_state_dict(self._best)
        self.outcome.test = self._evaluate("test")
        return self.outcome

    def _epoch_steps(self, epoch: int) -> Iterator[np.ndarray]:
        order = self._users[epoch_order(len(self._users), self._config.seed, epoch)]
        for users in step_users(order, self._config.batch_size):
            if self.outcome.steps >= self.total_steps:
                return
            yield users

    def _timed_step(self, users: np.ndarray) -> None:
        begin, times = time.perf_counter(), self.outcome.times
        known = times.known
        self._step(users)
        took = time.perf_counter() - begin
        times.total += took
        times.other += took - (times.known - known)
        self.outcome.steps += 1
        self.outcome.samples += len(users)
        self._reporter.stepped(self.outcome.steps, took)

    def first_batches(self) -> list[Packed]:
        """This replica's microbatches of the first step."""
        return self._batches(next(self._epoch_steps(0)))

    def _batches(self, users: np.ndarray) -> list[Packed]:
        config, backend = self._config, self._backend
        share = rank_share(users, backend.replica, backend.replicas)
        parts = (rank_share(share, part, config.pieces) for part in range(config.pieces))
        step = self.outcome.steps
        batches = [
            train_batch(self._data, self._split, part, config.model.max_len, seed=config.seed, step=step)
            for part in parts
        ]
        if not config.negatives:
            return batches
        # By step alone: the same on all ranks, and so is the loss, whatever the mesh.
        seed = int(np.random.SeedSequence((config.seed, step)).generate_state(1)[0])
        negatives = draw_negatives(self._data.num_items, config.negatives, seed=seed)
        return [replace(batch, negatives=negatives) for batch in batches]

    def _step(self, users: np.ndarray) -> None:
        """One optimizer step on this replica's share of ``users``."""
        backend = self._backend
        predictions = int(self._predictions[users].sum())
        batches = self._batches(users)
        for parameter in self._parameters:
            parameter.grad = None
        # Averaging over replicas divides by their number, so multiply by it: the sum of all losses / predictions.
        self._loss += backend.step(batches, backend.replicas / predictions, self.outcome.times)
        self._seen += sum(len(batch.targets) for batch in batches)
        begin = time.perf_counter()
        self._apply()
        end = time.perf_counter()
        self.outcome.times.optimizer += end - begin
        backend.optimized(begin, end)

    def _apply(self) -> None:
        """Optimizer step, or none at all on any rank when a gradient is not finite: all ranks hold the
        same ones."""
        norm = self._backend.gradient_norm()
        if not torch.isfinite(norm):
            self._backend.rollback()
            self.outcome.skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
                raise TrainError(
                    f"{_MAX_SKIPPED_IN_A_ROW} steps in a row had gradients that are not finite: lower "
                    "--optim.lr"
                )
            return
        self._skipped_in_a_row = 0
        if self._config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._config.optim.clip, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._config.optim, self.outcome.steps, self.total_steps)
        self._optimizer.step()

    def _validate(self, epoch: int) -> None:
        loss = self._backend.total_loss(self._loss)
        (predictions,) = self._backend.sum(np.array([self._seen]))
        self._loss, self._seen = 0.0, 0
        # No replica made a prediction: there is no mean loss.
        self.outcome.loss = float(loss / predictions) if predictions else float("nan")
        metrics = self._evaluate("validation")
        best = self.outcome.validation
        if best is None or metrics.ndcg > best.ndcg:
            self.outcome.validation, self.outcome.best_epoch = metrics, epoch
            self._best = {n: value.clone() for n, value in self._backend.module.state_dict().items()}
        self._reporter.validated(epoch, self.outcome, metrics)

    def _evaluate(self, which: str) -> Metrics:
        return evaluate_model(self._backend, self._data, self._split, self._config.model.max_len, which=which)
