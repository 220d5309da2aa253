"""A long random walk through all that ranks do together: ``python -m tests.soak --operations 10000 --seed 1``.

Ranks are threads. Every rank draws the same operations, sizes and groups from the seed, and delays of its own; results
are checked exactly. Contexts are made anew every few dozen operations, on another topology, two of them at a time. When
they are closed, the process must hold what it held before: descriptors, threads and segments to the last one, and
memory that does not grow with the number of operations.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybridcomm.topology import Topology
from hybridcomm.work import Work
from tests.census import Trend, census, resident_nbytes, return_what_is_freed, trend
from tests.engine_ranks import close_all, make_engine_contexts
from tests.ranks import run_ranks
from tests.soak_codecs import COMPRESSED
from tests.soak_groups import GROUPED
from tests.soak_operations import COLLECTIVES, Draw, Kind, Pending, forget_inputs

__all__ = ["Leak", "Report", "soak"]

KINDS = (*COLLECTIVES, *COMPRESSED, *GROUPED)
TOPOLOGIES = (
    Topology.virtual(2, 2),
    Topology.virtual(1, 3),
    Topology.virtual(3, 1),
    Topology.from_sizes([2, 1]),
    Topology.from_sizes([2, 1, 1]),
    Topology(nodes=((0, 2), (1, 3))),
)
GROUPS = 2
MAX_NUMEL = 5 << 18
"""5 MiB of float32."""
MAX_PENDING = 8
MAX_DELAY_S = 0.01
LEAST_LEAK = sys.getsizeof(Work.__new__(Work)) + sys.getsizeof({})
"""Bytes: the handle of an operation, the smallest thing that it could leave behind."""
SETTLING = 1 << 20
"""Bytes by which the allocator's pages move without any leak: the fewer operations, the coarser the judgement."""

Leak = Callable[[Pending], None]
"""Called after each operation of rank 0: tests keep things alive there that should not be."""


_kept: list[Any] = []
LEAKS: dict[str, Leak] = {
    "works": _kept.append,
    "descriptors": lambda _: _kept.append(os.dup(0)),
    "bytes": lambda _: _kept.append(bytes(1 << 14)),
}
"""What ``--plant`` does after each operation."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a soak found; ``memory`` in bytes per operation."""

    operations: int
    eras: int
    seed: int
    kinds: Counter[str]
    memory: Trend
    judged: int
    """Operations that ``memory`` was measured over: caches fill in those before."""
    left: tuple[int, int, int]
    """Descriptors, threads, mapped segments that there are more than after the first era."""

    @property
    def bound(self) -> float:
        """Bytes per operation; growth that is surely more is a leak."""
        return LEAST_LEAK + SETTLING / self.judged

    @property
    def problems(self) -> list[str]:
        names = ("descriptors", "threads", "segments")
        found = [f"{count:+} {name}" for count, name in zip(self.left, names, strict=True) if count]
        if self.memory.slope - self.memory.margin > self.bound:
            found.append(f"memory grows by {self.memory.slope:.0f} bytes per operation")
        return found

    def __str__(self) -> str:
        growth = f"{self.memory.slope:+.0f} +- {self.memory.margin:.0f} bytes of memory per operation"
        return (
            f"soak: {self.operations} operations in {self.eras} eras, seed {self.seed}, all exact; {growth} "
            f"(bound: {self.bound:.0f} + margin); {', '.join(self.problems) or 'nothing is left behind'}"
        )


@dataclass(kw_only=True)
class _Rank:
    """A thread's contexts, one per group."""

    number: int
    contexts: list[Any]

    def abort(self) -> None:
        for context in self.contexts:
            context.abort()


def draw(rng: random.Random, number: int, kinds: Sequence[Kind]) -> tuple[Kind, Draw, int]:
    """(kind, operation, group)."""
    kind = rng.choices(kinds, [kind.weight for kind in kinds])[0]
    numel = 0 if rng.random() < 0.03 else int(MAX_NUMEL ** rng.random())
    operation = Draw(number=number, numel=numel, pick=rng.getrandbits(32), async_op=rng.random() < 0.5)
    return kind, operation, rng.randrange(GROUPS)


def walk(rank: _Rank, numbers: range, seed: int, kinds: Sequence[Kind], leak: Leak | None) -> None:
    """One rank's part of an era."""
    shared, own = (
        random.Random(f"{seed}/{numbers.start}"),
        random.Random(f"{seed}/{numbers.start}/{rank.number}"),
    )
    pending: list[tuple[Kind, Draw, Pending]] = []

    def finish() -> None:
        own.shuffle(pending)  # waiting has no order
        for kind, operation, one in pending:
            if one.work is not None:
                one.work.wait()
            assert one.check(), f"{kind.name}, {operation}, rank {rank.number}: a wrong result"
        pending.clear()

    for number in numbers:
        if own.random() < 0.1:
            time.sleep(own.random() * MAX_DELAY_S)
        kind, operation, group = draw(shared, number, kinds)
        one = kind.start(rank.contexts[group], operation)
        pending.append((kind, operation, one))
        if leak is not None and rank.number == 0:
            leak(one)
        if len(pending) >= MAX_PENDING or own.random() < 0.2:
            finish()
    finish()


def era(numbers: range, seed: int, kinds: Sequence[Kind], leak: Leak | None) -> None:
    """Connects, walks, closes."""
    topology = random.Random(f"{seed}/{numbers.start}/topology").choice(TOPOLOGIES)
    groups = [make_engine_contexts(topology, chunk_nbytes=65536) for _ in range(GROUPS)]
    ranks = [
        _Rank(number=number, contexts=[group[number] for group in groups])
        for number in range(topology.world_size)
    ]
    try:
        run_ranks(lambda rank: walk(rank, numbers, seed, kinds, leak), ranks, timeout=300)
    finally:
        for group in groups:
            close_all(group)
        forget_inputs()


def soak(
    operations: int,
    *,
    seed: int = 1,
    era_length: int = 100,
    kinds: Sequence[Kind] = KINDS,
    leak: Leak | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Runs ``operations`` of them; raises `AssertionError` at the first wrong result.

    Changes how this process allocates: run it in one of its own.
    """
    return_what_is_freed()
    counts: Counter[str] = Counter()
    samples: list[tuple[float, float]] = []
    begins = range(0, operations, era_length)
    before = census()
    for begin in begins:
        numbers = range(begin, min(begin + era_length, operations))
        shared = random.Random(f"{seed}/{begin}")
        counts.update(draw(shared, number, kinds)[0].name for number in numbers)
        era(numbers, seed, kinds, leak)
        if begin == 0:
            before = census()  # what is loaded and started once is there now
        samples.append((float(numbers.stop), float(resident_nbytes())))
        progress(f"{numbers.stop} operations, {samples[-1][1] / 2**20:.1f} MiB")
    settled = samples[len(samples) // 2 :]
    left = tuple(now - then for now, then in zip(census(), before, strict=True))
    return Report(
        operations=operations,
        eras=len(begins),
        seed=seed,
        kinds=counts,
        memory=trend(settled),
        judged=int(settled[-1][0] - settled[0][0]),
        left=(left[0], left[1], left[2]),
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plant", choices=list(LEAKS), help="leak on purpose, to see it found")
    parser.add_argument("--era", type=int, default=100, help="operations before contexts are made anew")
    options = parser.parse_args()
    report = soak(
        options.operations,
        seed=options.seed,
        era_length=options.era,
        leak=LEAKS.get(options.plant),
        progress=lambda line: print(line, flush=True),
    )
    print(", ".join(f"{count} {name}" for name, count in sorted(report.kinds.items())))
    print(report)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
