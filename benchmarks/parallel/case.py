"""The model that all competitors train, its batches, and its losses in one process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from benchmarks.tolerance import loss_tolerance
from model.config import ModelConfig
from model.recommender import Recommender
from train.batch import Packed
from train.replica import ModelSpec

__all__ = ["Case", "Competitor", "reference"]

TOKENS = 64
"""Of a row, all of one user: no row is ragged, because peers want one shape."""
LR = 0.01


@dataclass(frozen=True, kw_only=True)
class Case:
    """An untied model without dropout over ``items`` items, and ``microbatches`` of ``rows`` rows for a step."""

    items: int
    layers: int = 8
    dim: int = 256
    rows: int = 4
    microbatches: int = 8

    @property
    def predictions(self) -> int:
        """Of a step, over all microbatches: every token is one."""
        return self.rows * TOKENS * self.microbatches

    @property
    def config(self) -> ModelConfig:
        """Weights are larger than one starts with, so that the loss depends on all of them."""
        return ModelConfig(
            dim=self.dim, layers=self.layers, heads=4, hidden=43 * self.dim // 16, max_len=TOKENS,
            dropout=0.0, tied=False, text=False, init_std=0.08,
        )  # fmt: skip

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(config=self.config, num_items=self.items)

    def tolerance(self, loss: float) -> float:
        """How far a loss in fp32 may be from ``loss``."""
        return loss_tolerance(self.config, items=self.items, predictions=self.predictions, loss=loss)

    def batches(self) -> list[Packed]:
        """The microbatches of a step, the same in every step and on every rank."""
        dice = torch.Generator().manual_seed(1)
        return [self._batch(self.rows, dice) for _ in range(self.microbatches)]

    def joined(self, parts: int = 1) -> list[Packed]:
        """The step's users in ``parts`` batches."""
        every = self.batches()
        size = len(every) // parts
        return [_join(every[part * size : (part + 1) * size]) for part in range(parts)]

    def whole(self, dtype: torch.dtype = torch.float32) -> Recommender:
        """The whole model; everyone's weights are these."""
        torch.manual_seed(0)
        return Recommender(self.config, self.items).to(dtype)

    def _batch(self, rows: int, dice: torch.Generator) -> Packed:
        items, targets = (torch.randint(self.items, (rows, TOKENS), generator=dice) for _ in range(2))
        return _packed(items, targets)


def _packed(items: torch.Tensor, targets: torch.Tensor) -> Packed:
    rows = torch.arange(len(items))[:, None].expand(-1, TOKENS).contiguous()
    return Packed(
        items=items,
        segments=rows,
        positions=torch.arange(TOKENS).expand(len(items), -1).contiguous(),
        picks=torch.arange(items.numel()),
        targets=targets.reshape(-1),
    )


def _join(batches: list[Packed]) -> Packed:
    targets = torch.cat([batch.targets for batch in batches]).view(-1, TOKENS)
    return _packed(torch.cat([batch.items for batch in batches]), targets)


class Competitor(ABC):
    """One way to train the model on this rank: ``step`` does forward, backward and an SGD step.

    ``name`` and ``choice`` (its split, say) stand in the table.
    """

    name: str
    choice: str = ""
    exposed: float = 0.0
    """s from the last gradient to all means, summed over steps; data parallelism only."""

    @abstractmethod
    def step(self) -> float:
        """This rank's part of the mean loss of the step's predictions: the sum over the ranks is that."""


def reference(case: Case, steps: int) -> list[float]:
    """Losses of the first steps of one process, in fp64."""
    model = case.whole(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for batch in case.batches():
            loss = model(*batch.inputs, batch.targets) / case.predictions
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
    return losses
