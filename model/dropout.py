"""Dropout under tensor parallelism: one mask where all ranks have one tensor, different ones where each has a part.

Masks come from one generator that is in step on all ranks. Where they have to differ, it gives a number that is the
same on all ranks, and number and rank seed a generator for this one mask. So there is no state beside torch's
own, which activation checkpointing restores; the number of ranks and their rank never change what the others draw.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridcomm.errors import UnsupportedError
from model.tensor_parallel import ALONE, TensorParallel

__all__ = ["Dropout"]

_SPREAD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: seeds of neighbouring ranks share no bits


class Dropout(nn.Module):
    """Zeroes elements with probability ``p`` and scales the rest by 1 / (1 - p), in training only.

    ``split``: the tensors are parts (tokens or heads) and not the same on all ranks of ``tp``, so the masks differ.
    """

    def __init__(self, p: float, *, tp: TensorParallel = ALONE, split: bool = False) -> None:
        super().__init__()
        self.p, self.tp, self.split = p, tp, split

    @property
    def active(self) -> bool:
        return self.training and self.p > 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        alike = not self.split or self.tp.size == 1
        return F.dropout(x, self.p) if alike and self.tp.generator is None else x * self._mask(x)

    @torch.compiler.disable  # generators of one's own are nothing that a graph can hold
    def _mask(self, x: Tensor) -> Tensor:
        source = self.tp.generator
        if source is not None and torch._C._current_graph_task_id() != -1:
            raise UnsupportedError(
                "activation checkpointing draws the masks of a segment again, and restores torch's own generator for "
                "it: leave TensorParallel.generator at None"
            )
        if self.split and self.tp.size > 1:
            drawn = int(torch.randint(2**62, (), generator=source))
            source = torch.Generator(x.device).manual_seed((drawn + self.tp.rank * _SPREAD) % 2**63)
        return torch.empty_like(x).bernoulli_(1.0 - self.p, generator=source).div_(1.0 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, split={self.split}"
