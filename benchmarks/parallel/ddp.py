"""The peer of data parallelism: DistributedDataParallel over gloo; and steps of a rank alone, which are limits."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.parallel.case import LR, Case, Competitor
from train.backend_ddp import LastGradient
from train.batch import Packed

__all__ = ["DDP", "Alone"]


class DDP(Competitor):
    """Our model in DDP; ``exposed`` adds up the s from the last gradient to all means.

    With ``average=False`` nothing is averaged: what both competitors compute, and so their limit.
    """

    def __init__(self, case: Case, *, average: bool = True) -> None:
        self.name = "DDP, gloo" if average else "no average"
        self._case = case
        self._batch = case.joined(2)[dist.get_rank()]
        self._model: nn.Module = case.whole()
        parameters = list(self._model.parameters())
        self._last = LastGradient(parameters)
        if average:
            self._model = DistributedDataParallel(self._model, gradient_as_bucket_view=True)
        self._optimizer = torch.optim.SGD(parameters, lr=LR)
        self.exposed = 0.0

    def step(self) -> float:
        self._optimizer.zero_grad()
        loss = self._model(*self._batch.inputs, self._batch.targets)
        (loss * (dist.get_world_size() / self._case.predictions)).backward()
        self.exposed += time.perf_counter() - self._last.at
        self._optimizer.step()
        return loss.item() / self._case.predictions


class Alone(Competitor):
    """The whole model's whole step on this rank, while the other does the same: half of it is the limit."""

    name = "one core"

    def __init__(self, case: Case, batches: list[Packed]) -> None:
        self._case, self._model, self._batches = case, case.whole(), batches
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=LR)

    def step(self) -> float:
        self._optimizer.zero_grad()
        total = 0.0
        for batch in self._batches:
            loss = self._model(*batch.inputs, batch.targets)
            (loss / self._case.predictions).backward()
            total += loss.item()
        self._optimizer.step()
        return total / self._case.predictions / dist.get_world_size()
