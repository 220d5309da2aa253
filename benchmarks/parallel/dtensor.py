"""The peer of tensor parallelism: DTensor's parallelize_module with loss_parallel."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from benchmarks.parallel import plain
from benchmarks.parallel.case import LR, Case, Competitor

__all__ = ["DTensorParallel"]


class DTensorParallel(Competitor):
    """Linears by columns and rows, the embedding by rows, scores by items, and a loss that stays sharded.

    One fused matrix makes queries, keys and values, another gate and up, so that each block's input has its gradient
    summed once per layer. The loss's targets are whole on both ranks.
    """

    name, choice = "DTensor, loss_parallel", "parallelize_module"

    def __init__(self, case: Case) -> None:
        world = dist.get_world_size()
        mesh = init_device_mesh("cpu", (world,))
        plan = {
            "0.items": RowwiseParallel(input_layouts=Replicate()),
            f"{case.layers + 1}.scores": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        }
        for layer in range(1, case.layers + 1):
            plan |= {f"{layer}.{name}": ColwiseParallel() for name in ("qkv", "gate_up")}
            plan |= {f"{layer}.{name}": RowwiseParallel() for name in ("out", "down")}
        self._model: nn.Module = parallelize_module(
            nn.Sequential(*plain.layers(case, shares=world)), mesh, plan
        )
        (self._batch,) = case.joined()
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=LR)

    def step(self) -> float:
        self._optimizer.zero_grad()
        with loss_parallel():
            loss: Tensor = F.cross_entropy(self._model(self._batch.items), self._batch.targets)
            loss.backward()
        self._optimizer.step()
        return loss.item() / dist.get_world_size()
