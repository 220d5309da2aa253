"""The peer to compare with: torch's DistributedDataParallel over gloo."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train.backend import WholeModel
from train.batch import Packed
from train.config import TrainConfig
from train.errors import TrainError
from train.replica import ModelSpec

__all__ = ["DDPBackend", "LastGradient"]


class DDPBackend(WholeModel):
    """Each rank has the whole model, wrapped in DistributedDataParallel."""

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

    def build(self, spec: ModelSpec) -> Sequence[nn.Parameter]:
        from torch.nn.parallel import DistributedDataParallel

        parameters = super().build(spec)
        self._last = LastGradient(parameters)
        cap = self._config.wire.bucket_cap_mb
        self._ddp = DistributedDataParallel(
            self.model, gradient_as_bucket_view=True, **({} if cap is None else {"bucket_cap_mb": cap})
        )
        self._register_hook()
        return parameters

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

    def forward(self, batch: Packed) -> Tensor:
        return self._ddp(*batch.inputs, batch.targets, negatives=batch.negatives, draws=batch.draws)

    def accumulating(self, *, sync: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if sync else self._ddp.no_sync()

    def averaged(self) -> float:
        """DDP waits for its buckets in a callback at the end of backward."""
        return time.perf_counter() - self._last.at

    def sum_of_ranks(self, values: np.ndarray) -> np.ndarray:
        total = torch.from_numpy(values.copy())
        self._dist.all_reduce(total)
        return total.numpy()

    def share(self, features: Tensor) -> Tensor:
        self._dist.broadcast(features, 0)
        return features

    def describe(self) -> str:
        hook = self._config.wire.ddp_hook
        return f"torch DistributedDataParallel over gloo, {self.world_size} ranks, hook {hook}"

    def close(self) -> None:
        self._dist.destroy_process_group()


class LastGradient:
    """Notes when the latest gradient of a backward pass was complete."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.at = 0.0
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, _: Tensor) -> None:
        self.at = time.perf_counter()
