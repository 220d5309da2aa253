"""Checks that competitors compute the same, chooses each one's best way, and times the best in interleaved rounds."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.parallel.case import Case, Competitor, reference
from benchmarks.timing import slowest

__all__ = ["Contest"]

_CHECKED = 2
"""Steps whose losses are compared: the second one's shows whether gradients were right."""
_FINALISTS = 3
"""Of each peer, into the rounds: a few timed steps are too few to tell good splits apart."""
_TRIED = 3
"""Steps that choose the finalists, behind those that are checked."""

Maker = Callable[[], Competitor]


@dataclass(kw_only=True)
class Contest:
    """All competitors of one case; ``expected`` losses are those of one process in fp64."""

    case: Case
    expected: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        known = torch.zeros(_CHECKED, dtype=torch.float64)
        if dist.get_rank() == 0:
            known += torch.tensor(reference(self.case, _CHECKED), dtype=torch.float64)
        dist.broadcast(known, 0)
        self.expected = known.tolist()

    def check(self, competitor: Competitor, steps: int = _CHECKED) -> float:
        """Its first steps, from the initial weights; s of the last. AssertionError where a loss is wrong."""
        for step, want in enumerate(self.expected[:steps]):
            seconds, loss = _timed(competitor)
            bound = self.case.tolerance(want)
            if not abs(loss - want) <= bound:
                raise AssertionError(
                    f"{competitor.name} {competitor.choice}: step {step + 1} has loss {loss:.7f}, one process "
                    f"{want:.7f}; they may be {bound:.1e} apart"
                )
        return seconds

    def best(self, makers: Sequence[Maker]) -> list[Competitor]:
        """Each way once, checked; those whose fastest step was fastest."""
        kept: list[tuple[float, int, Competitor]] = []
        for number, make in enumerate(makers):
            competitor = make()
            seconds = min(self.check(competitor), *(_timed(competitor)[0] for _ in range(_TRIED)))
            kept = sorted([*kept, (seconds, number, competitor)])[:_FINALISTS]
            del competitor
            gc.collect()
        return [competitor for *_, competitor in kept]

    def rounds(self, competitors: Sequence[Competitor], count: int) -> list[dict[str, Any]]:
        """``count`` rounds in which each has a step in turn, ranks starting together; all have run before."""
        seconds: list[list[float]] = [[] for _ in competitors]
        before = [competitor.exposed for competitor in competitors]
        gc.collect()
        gc.disable()
        for _ in range(count):
            for times, competitor in zip(seconds, competitors, strict=True):
                times.append(_timed(competitor)[0])
        gc.enable()
        exposed = [slowest([c.exposed - b])[0] / count for c, b in zip(competitors, before, strict=True)]
        return [
            {
                "name": competitor.name,
                "choice": competitor.choice,
                "ms": 1e3 * statistics.median(times),
                "least_ms": 1e3 * min(times),
                "greatest_ms": 1e3 * max(times),
                "exposed_ms": 1e3 * wait,
            }
            for competitor, times, wait in zip(competitors, seconds, exposed, strict=True)
        ]


def _timed(competitor: Competitor) -> tuple[float, float]:
    """(s of a step on the rank that takes longest, the loss)."""
    dist.barrier()
    begin = time.perf_counter()
    loss = torch.tensor([competitor.step()], dtype=torch.float64)
    seconds = time.perf_counter() - begin
    dist.all_reduce(loss)
    return slowest([seconds])[0], float(loss)
