"""Modules whose gradients are small integers, so that averaging over a power of two of ranks is exact."""

from __future__ import annotations

import torch
from torch import nn


def ternary_(module: nn.Module, seed: int = 0) -> None:
    """Weights in {-1, 0, 1}."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator).to(parameter.dtype))


class ExactNet(nn.Module):
    """Embedding, two linear layers and a head tied to the embedding: one parameter shared."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8, dtype=dtype)
        self.first = nn.Linear(8, 12, dtype=dtype)
        self.second = nn.Linear(12, 8, dtype=dtype)
        self.head = nn.Linear(8, 40, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        ternary_(self)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(self.embed(ids))))

    def loss(self, rank: int, step: int) -> torch.Tensor:
        """Differs per rank and step; linear in the output, so gradients are integers."""
        generator = torch.Generator().manual_seed(1000 * step + rank)
        ids = torch.randint(0, 40, (5,), generator=generator)
        out = self(ids)
        return (out * torch.randint(-2, 3, out.shape, generator=generator)).sum()
