"""Three linear layers, their inputs, and what became of their gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.linear import Linear
from model.weight_gradients import Deferrable, WeightGradients

__all__ = ["grads", "inputs", "output", "queued", "same", "stack"]


def stack() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(Linear(7, 9), nn.SiLU(), Linear(9, 9), nn.SiLU(), Linear(9, 5))


def inputs(microbatch: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 + microbatch)
    return torch.randn(2, 6, 7, generator=generator, requires_grad=True)


def grads(module: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in module.parameters()]


def same(left: list[Tensor | None], right: list[Tensor | None]) -> bool:
    return all(
        a is not None and b is not None and torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


def queued(module: nn.Module) -> WeightGradients:
    return WeightGradients(Deferrable.of(module))


def output(module: nn.Module, x: Tensor, *, autocast: bool = False, checkpointed: bool = False) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
