"""What a rank's case works with: both contexts, its GPU, values that differ by rank, and comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from hybridcomm.device_context import DeviceContext
    from hybridcomm.groups import Grouping
    from hybridcomm.selftest.gpu import Gpu

__all__ = ["EXACT_RANKS", "Rank", "all_differ", "differ", "gradient", "near", "numbers", "put", "total"]

EXACT_RANKS = 4000
"""Up to so many, sums of `numbers` are exact in float32."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The host's context, its device's, and torch on that device. A case is called with it on every rank."""

    host: Grouping
    device: DeviceContext
    torch: Gpu

    @property
    def rank(self) -> int:
        return self.host.rank

    @property
    def world(self) -> int:
        return self.host.world_size

    def upload(self, data: Tensor) -> Tensor:
        return self.torch.upload(data)

    def download(self, tensor: Tensor) -> Tensor:
        return self.torch.download(tensor)

    def align(self) -> None:
        """The device's next call draws what the host's next one does, whatever either has done so far."""
        self.device._first = self.host._engine.counters()["calls"] - self.device._calls


def gradient(numel: int, rank: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Seeded by rank and step; a few large elements among many small ones."""
    rng = np.random.default_rng((rank, step, numel))
    values = rng.standard_normal(numel).astype(np.float32)
    values[rng.integers(0, numel, max(numel // 100, 1))] *= 50
    return torch.from_numpy(values).to(dtype)


def numbers(numel: int, rank: int) -> torch.Tensor:
    """Small integers, whose sums are exact in any order."""
    return (torch.arange(numel) % 7 - 3 + rank).to(torch.float32)


def total(rank: Rank, numel: int) -> torch.Tensor:
    """The sum of all ranks' `numbers`."""
    return sum((numbers(numel, other) for other in range(rank.world)), torch.zeros(numel))


def put(rank: Rank, tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Writes values into tensors on the device."""
    sources = [rank.upload(each) for each in values]
    rank.torch.copy(tensors, sources)
    rank.torch.synchronize()  # before the sources go


def differ(what: str, got: torch.Tensor, want: torch.Tensor) -> Iterator[str]:
    """A line where two tensors, of one size and dtype, have not the same bits."""
    wrong = int((_bytes_of(got) != _bytes_of(want)).any(1).sum())
    if wrong:
        yield f"value: {what}, {wrong} of {want.numel()} elements"


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, 1).contiguous().view(torch.uint8)


def all_differ(rank: Rank, tensors: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> list[str]:
    """A line for each tensor on the device that is not equal to what is wanted."""
    pairs = enumerate(zip(tensors, want, strict=True))
    return [line for i, (t, w) in pairs for line in differ(f"tensor {i}", rank.download(t), w)]


def near(what: str, got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor, terms: int) -> Iterator[str]:
    """A line where ``got`` is farther from ``want`` than roundings can bring a sum, or a mean, of ``terms`` elements.

    ``want``, ``scale``: float64, what is exact and the sum of magnitudes. Additions round terms - 1 times; a mean also
    rounds its factor, a product, and ``want``. Bound: Higham, Accuracy and Stability of Numerical Algorithms, (4.4).
    """
    unit = torch.finfo(got.dtype).eps / 2
    roundings = terms + 2
    bound = scale * (roundings * unit / (1 - roundings * unit))
    off = (got.double() - want).abs()
    if not bool((off <= bound).all()):
        worst = float((off - bound).max())
        yield f"value: {what}, {int((~(off <= bound)).sum())} of {want.numel()} elements beyond the bound, by {worst:g}"
