"""Who averages gradients: our library, or torch's DistributedDataParallel over gloo as the peer to
compare with.

Both are measured the same way. *Exposed communication* of a step is the time from the moment this rank's
last gradient is complete (a hook on every parameter notes the time; the latest one counts) to the moment
all averaged gradients are in ``p.grad``. For ours that is when `Reducer.finalize` returns; for DDP when
``backward`` returns, since DDP waits for its buckets in a callback at the end of backward. Copies out of
the buckets count for both. Communication that slows backward down by taking processor time shows up in
backward, for both.
"""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import hybridcomm
from hybridcomm import collective_plans
from train.config import TrainConfig
from train.errors import ConfigError, TrainError

__all__ = ["Communicator", "DDPCommunicator", "HybridCommunicator", "connect"]


class Communicator(ABC):
    """One rank's side of gradient averaging; made by `connect`, then bound to a model once by `prepare`."""

    rank: int
    world_size: int
    exposed_seconds = 0.0

    @abstractmethod
    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Makes all ranks start from rank 0's weights; returns the module to call in the forward pass."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, sync: bool) -> None:
        """Backward pass; with ``sync`` the accumulated gradients are averaged before this returns."""

    def accumulating(self, *, sync: bool) -> contextlib.AbstractContextManager[None]:
        """Put around forward and backward of a microbatch."""
        del sync
        return contextlib.nullcontext()

    def rollback(self) -> None:  # noqa: B027 (a peer without a residual has nothing to do)
        """The averaged gradients are not going to be applied."""

    @abstractmethod
    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum over ranks of a 1-D fp64 or int64 array."""

    def wire_nbytes(self) -> int | None:
        """Bytes of gradients this rank has sent to other nodes; None when the backend does not count them."""
        return None

    def dense_wire_nbytes(self) -> int | None:
        """What all ranks together would send between nodes per step without compression."""
        return None

    def describe(self) -> str:
        """What was asked for and what is active."""
        return type(self).__name__

    @abstractmethod
    def close(self) -> None:
        """Leaves the group."""


class _LastGradient:
    """Notes when the latest gradient of a backward pass was complete."""

    def __init__(self, model: nn.Module) -> None:
        self.at = 0.0
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, _: torch.Tensor) -> None:
        self.at = time.perf_counter()


class HybridCommunicator(Communicator):
    """hybridcomm's Reducer."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self.context = hybridcomm.init(timeout=config.wire.timeout)
        self.rank, self.world_size = self.context.rank, self.context.world_size

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        compress = None if self._config.compress == "none" else self._config.compress
        self._last = _LastGradient(model)
        self.reducer = hybridcomm.Reducer(
            model, ctx=self.context, compress=compress, bucket_cap_mb=self._config.wire.bucket_cap_mb
        )
        self.reducer.attach(optimizer)
        return model

    def accumulating(self, *, sync: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if sync else self.reducer.no_sync()

    def backward(self, loss: torch.Tensor, *, sync: bool) -> None:
        loss.backward()
        if sync:
            self.reducer.finalize()
            self.exposed_seconds = time.perf_counter() - self._last.at

    def rollback(self) -> None:
        self.reducer.rollback()

    def sum(self, values: np.ndarray) -> np.ndarray:
        total = values.copy()
        self.context.allreduce(total, op="sum")
        return total

    def wire_nbytes(self) -> int:
        return self.reducer.stats().total_wire_nbytes

    def dense_wire_nbytes(self) -> int:
        topology = self.context.topology
        plans = [
            collective_plans.allreduce(topology, layout.numel, dtype=layout.dtype, op="mean")
            for layout in self.reducer.layouts
        ]
        return sum(plan.wire_nbytes() for plan in plans)

    def describe(self) -> str:
        return self.reducer.table()

    def close(self) -> None:
        hybridcomm.shutdown()


class DDPCommunicator(Communicator):
    """torch's DistributedDataParallel over gloo, for comparison."""

    def __init__(self, config: TrainConfig) -> None:
        import torch.distributed as dist

        self._dist, self._config = dist, config
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        directory = os.environ.get("HYBRIDCOMM_STORE")
        store: Any = None
        if directory:
            store = dist.FileStore(str(Path(directory) / "gloo"), world_size)
        elif world_size == 1:
            store = dist.HashStore()
        try:
            dist.init_process_group(
                "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=config.wire.timeout),
            )
        except (RuntimeError, ValueError) as error:
            raise TrainError(f"rank {rank}: gloo could not connect: {str(error).splitlines()[0]}") from error
        self.rank, self.world_size = rank, world_size

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        del optimizer
        self._last = _LastGradient(model)
        options = (
            {}
            if self._config.wire.bucket_cap_mb is None
            else {"bucket_cap_mb": self._config.wire.bucket_cap_mb}
        )
        self._ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
        self._register_hook()
        return self._ddp

    def _register_hook(self) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        hooks: dict[str, tuple[Any, Callable[..., Any]]] = {
            "fp16": (None, default_hooks.fp16_compress_hook),
            "powersgd": (
                powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2),
                powerSGD_hook.powerSGD_hook,
            ),
        }
        if self._config.wire.ddp_hook != "none":
            self._ddp.register_comm_hook(*hooks[self._config.wire.ddp_hook])

    def accumulating(self, *, sync: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if sync else self._ddp.no_sync()

    def backward(self, loss: torch.Tensor, *, sync: bool) -> None:
        loss.backward()
        if sync:
            self.exposed_seconds = time.perf_counter() - self._last.at

    def sum(self, values: np.ndarray) -> np.ndarray:
        total = torch.from_numpy(values.copy())
        self._dist.all_reduce(total)
        return total.numpy()

    def describe(self) -> str:
        hook = self._config.wire.ddp_hook
        return f"torch DistributedDataParallel over gloo, {self.world_size} ranks, hook {hook}"

    def close(self) -> None:
        self._dist.destroy_process_group()


def connect(config: TrainConfig) -> Communicator:
    """Joins the job with the configured backend; raises HybridCommError or TrainError naming who did not
    come."""
    kinds: dict[str, Callable[[TrainConfig], Communicator]] = {
        "hybridcomm": HybridCommunicator,
        "ddp": DDPCommunicator,
    }
    if config.comm not in kinds:
        raise ConfigError(f"--comm {config.comm}: use one of {', '.join(kinds)}")
    return kinds[config.comm](config)
