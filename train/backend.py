"""Who holds the model, runs its microbatches and makes their gradients one: what the training loop asks of a backend.

`WholeModel` has all of the model on each rank; `train.backend_ddp` adds torch's DistributedDataParallel to it.
`train.backend_hybrid` is ours: replicas of pipelines of shared layers.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from model.recommender import Recommender
from train.batch import Packed
from train.outcome import StepTimes
from train.profile import RankTrace
from train.replica import ModelSpec

__all__ = ["Backend", "WholeModel"]


class Backend(ABC):
    """One rank's side of training; connected when it is made, then given the model once by `build`.

    ``replica`` of ``replicas``: which copy of the model this rank is part of, and so whose users it trains on.
    """

    rank: int
    world_size: int
    replica: int
    replicas: int

    @abstractmethod
    def build(self, spec: ModelSpec) -> Sequence[nn.Parameter]:
        """Makes this rank's share of the model, equal on all replicas; its parameters."""

    def updated(self) -> Sequence[Tensor]:
        """What this rank's optimizer is given: its parameters, or the part of them that it updates for others too."""
        return list(self.module.parameters())

    def attach(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027 (not everyone needs to know)
        """The optimizer that applies the gradients to what is `updated`."""

    @abstractmethod
    def step(self, batches: Sequence[Packed], scale: float, times: StepTimes) -> float:
        """Leaves in .grad the mean over replicas of the gradient of ``scale`` times the sum of losses.

        ``batches`` are the replica's microbatches. Adds to ``times``; returns this rank's sum of losses, which need not
        be the replica's: `total_loss` tells that.
        """

    def optimized(self, begin: float, end: float) -> None:  # noqa: B027
        """The optimizer was at work between these times (``time.perf_counter``)."""

    def traces(self) -> list[RankTrace]:
        """The latest steps of all ranks, on rank 0; elsewhere, and where nothing is traced, none. All ranks call it."""
        return []

    def total_loss(self, loss: float) -> float:
        """What `step` has returned since it was last asked for, summed: of all replicas, on all ranks."""
        return float(self.sum(np.array([loss]))[0])

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Of the whole model; the same on all ranks."""

    def rollback(self) -> None:  # noqa: B027 (a peer without a residual has nothing to do)
        """The gradients of the last step are not going to be applied."""

    @abstractmethod
    def target_ranks(self, batch: Packed, histories: Sequence[np.ndarray]) -> Tensor:
        """Each target's rank in the full ranking, int64, on all ranks of the replica."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """This rank's share of the model."""

    @abstractmethod
    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum over replicas of a 1-D fp64 or int64 array that is equal on all ranks of each."""

    @abstractmethod
    def sum_of_ranks(self, values: np.ndarray) -> np.ndarray:
        """Sum over all ranks of a 1-D fp64 or int64 array."""

    def share(self, features: Tensor) -> Tensor:
        """Rank 0's tensor, on all ranks."""
        return features

    def wire_nbytes(self) -> int | None:
        """Bytes of gradients this rank has sent to other nodes; None when the backend does not count them."""
        return None

    def dense_wire_nbytes(self) -> int:
        """This rank's part of what all ranks together would send between nodes per step without compression."""
        return 0

    def describe(self) -> str:
        """What was asked for and what is active."""
        return type(self).__name__

    @abstractmethod
    def close(self) -> None:
        """Leaves the group."""


class WholeModel(Backend):
    """Each rank has the whole model; alone, unless a subclass averages gradients."""

    rank, world_size = 0, 1

    @property
    def replica(self) -> int:  # type: ignore[override]
        return self.rank

    @property
    def replicas(self) -> int:  # type: ignore[override]
        return self.world_size

    @property
    def module(self) -> nn.Module:
        return self.model

    def build(self, spec: ModelSpec) -> Sequence[nn.Parameter]:
        torch.manual_seed(spec.seed)
        self.model = Recommender(spec.config, spec.num_items, spec.features, computing=spec.computing).to(
            spec.dtype
        )
        return list(self.model.parameters())

    def forward(self, batch: Packed) -> Tensor:
        """The sum of losses."""
        return self.model(*batch.inputs, batch.targets, negatives=batch.negatives, draws=batch.draws)

    def accumulating(self, *, sync: bool) -> contextlib.AbstractContextManager[None]:
        """Put around forward and backward of a microbatch; with ``sync`` it is the step's last."""
        del sync
        return contextlib.nullcontext()

    def averaged(self) -> float:
        """Called behind the step's last backward: gradients are means when it returns.

        Returns the s since the last gradient was complete, some of which may have passed inside backward.
        """
        return 0.0

    def step(self, batches: Sequence[Packed], scale: float, times: StepTimes) -> float:
        total = 0.0
        for number, batch in enumerate(batches, start=1):
            with self.accumulating(sync=number == len(batches)):
                begin = time.perf_counter()
                loss = self.forward(batch)
                middle = time.perf_counter()
                (loss * scale).backward()
                exposed = self.averaged() if number == len(batches) else 0.0
                times.forward += middle - begin
                times.backward += time.perf_counter() - middle - exposed
                times.exposed += exposed
            total += loss.item()
        return total

    def gradient_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def target_ranks(self, batch: Packed, histories: Sequence[np.ndarray]) -> Tensor:
        return self.model.target_ranks(batch.inputs, batch.targets, histories)

    def sum(self, values: np.ndarray) -> np.ndarray:
        return self.sum_of_ranks(values)

    def sum_of_ranks(self, values: np.ndarray) -> np.ndarray:
        return values.copy()

    def close(self) -> None:
        """Nothing to leave."""
