"""Paired differences and their t-interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PairedDifference", "t_quantile"]


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t with ``freedom`` degrees, for a probability in 0.5..1, to about 1e-9."""
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(
            f"t_quantile({probability}, {freedom}): want 0.5 <= probability < 1 and freedom >= 1"
        )
    # With t = sqrt(n) tan(a) the density is proportional to cos(a)^(n - 1) on -pi/2..pi/2.
    whole = math.sqrt(math.pi) * math.gamma(freedom / 2) / math.gamma((freedom + 1) / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if 0.5 + _integral(middle, freedom - 1) / whole < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _integral(end: float, power: int, parts: int = 1000) -> float:
    """Simpson's rule for cos(a)^power from 0 to end."""
    step = end / parts
    inner = sum((4 if i % 2 else 2) * math.cos(i * step) ** power for i in range(1, parts))
    return (1 + inner + math.cos(end) ** power) * step / 3


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean of paired differences (second minus first) with a 95 % interval, and the mean of the first."""

    mean: float
    low: float
    high: float
    base: float
    pairs: int

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> PairedDifference:
        """From two equally long series, two pairs at least."""
        differences = [b - a for a, b in zip(first, second, strict=True)]
        count = len(differences)
        if count < 2:
            raise ValueError(f"{count} pairs: an interval needs two at least")
        mean = statistics.fmean(differences)
        half = t_quantile(0.975, count - 1) * statistics.stdev(differences) / math.sqrt(count)
        return cls(mean=mean, low=mean - half, high=mean + half, base=statistics.fmean(first), pairs=count)

    @property
    def relative_low(self) -> float:
        """The lower bound as a part of the first series' mean: -0.02 is 2 % worse."""
        return self.low / self.base
