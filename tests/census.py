"""What a process holds: descriptors, threads, mapped segments, memory; for tests that nothing is left behind."""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Trend", "census", "resident_nbytes", "return_what_is_freed", "trend"]


def census() -> tuple[int, int, int]:
    """Open descriptors, threads, mappings of engine segments."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return (
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        maps.count("memfd:hybridcomm"),
    )


def return_what_is_freed() -> None:
    """From now on, in this process: glibc maps every larger block by itself, and has two heaps for all threads.

    Otherwise holes between blocks, a hundred MiB of them, would hide the growth that one looks for.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
        libc.mallopt(-8, 2)  # M_ARENA_MAX


def resident_nbytes() -> int:
    """Resident memory, once the allocator has returned what is free."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    rollup = Path("/proc/self/smaps_rollup").read_text()  # exact, unlike statm, whose counters lag behind
    return next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Rss:"))


@dataclass(frozen=True, kw_only=True)
class Trend:
    """A line through (x, y): growth of y per x, and how far off chance alone may make it."""

    slope: float
    margin: float


def trend(samples: Sequence[tuple[float, float]], *, confidence: float = 0.9999) -> Trend:
    """Least squares; the margin is for ``confidence`` (one-sided), widened for samples that follow each other.

    Neighbouring samples share most of what they measure: with correlation r of neighbouring residuals, n of them say
    as much as n (1 - r) / (1 + r) independent ones.
    """
    xs, ys = [x for x, _ in samples], [y for _, y in samples]
    if len(samples) < 4:
        raise ValueError(f"{len(samples)} samples are too few for a trend")
    slope, intercept = statistics.linear_regression(xs, ys)
    rests = [y - slope * x - intercept for x, y in samples]
    squares = sum(rest * rest for rest in rests)
    spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
    error = math.sqrt(squares / (len(samples) - 2) / spread)
    neighbours = sum(a * b for a, b in itertools.pairwise(rests))
    r = min(max(neighbours / squares, 0.0), 0.9) if squares else 0.0
    quantile = statistics.NormalDist().inv_cdf(confidence)
    return Trend(slope=slope, margin=quantile * error * math.sqrt((1 + r) / (1 - r)))
