"""Timing of collectives: a call takes as long as on its slowest rank; figures are medians of fixed rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

__all__ = ["Timing", "link_bytes", "slowest", "wire_limit"]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Median, least and greatest of some times, in milliseconds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, seconds: Sequence[float], minus: float = 0.0) -> Timing:
        """From times in seconds; ``minus`` (seconds) is taken off each, for a part of no interest."""
        values = [(value - minus) * 1e3 for value in seconds]
        return cls(median=statistics.median(values), least=min(values), greatest=max(values))


def slowest(seconds: Sequence[float]) -> list[float]:
    """Each call's time on the rank where it took longest; collective over torch's default group."""
    times = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return [float(value) for value in times]


def link_bytes(device: str = "eth0") -> int:
    """Bytes this node has sent, by the kernel's interface counter; 0 when there is no such device."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == device:
            return int(rest.split()[8])
    return 0


def wire_limit(nodes: int, nbytes: int, bits_per_second: float) -> float:
    """Seconds a dense all-reduce of ``nbytes`` needs at least on the links: 2 (M - 1) / M * S / rate."""
    return 2 * (nodes - 1) / nodes * nbytes * 8 / bits_per_second
