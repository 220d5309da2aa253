"""Checks schedules of every kind over a grid of sizes: ``python -m tests.schedules`` checks all up to 16 x 64.

Each is checked as written, and lowered with a split head and uneven buckets; the channels of the lowered lists hold
as few messages as the kind needs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence

from train.errors import TrainError
from train.pipeline import SCHEDULES, PipelineSchedule, check, lower, make_schedule, simulate

__all__ = ["check_schedule", "check_sizes", "least_slots"]

RANKS, MICROBATCHES, CHUNKS = 16, 64, (2, 3)


def least_slots(schedule: PipelineSchedule) -> int:
    """Messages that a channel must hold: one, and for interleaved turns longer than p what is ahead of its use."""
    if "interleaved" not in schedule.name:
        return 1
    turns = max(1, schedule.microbatches // schedule.ranks)
    return max(1, -(-schedule.microbatches // turns) - schedule.ranks)


def check_schedule(schedule: PipelineSchedule, *, head: bool) -> None:
    """As written: peak activations as the registry says. Lowered: correct, also with few slots."""
    kind, chunks = SCHEDULES[schedule.name], schedule.stages // schedule.ranks
    for rank, peak in enumerate(check(schedule).peak_activations):
        most = kind.peak(rank, schedule.ranks, schedule.microbatches, chunks)
        if peak > most:
            raise TrainError(f"{schedule.name}: rank {rank} holds {peak} activations, not {most}")
    buckets = [(stage + schedule.microbatches) % 3 for stage in range(schedule.stages + head)]
    lowered = lower(schedule, head=head, buckets=buckets)
    check(lowered)
    if not head:
        check(lowered, slots=least_slots(schedule))


def check_sizes(
    name: str, sizes: Iterable[tuple[int, int]], *, heads: bool = True, chunks: Sequence[int] = CHUNKS
) -> int:
    """All schedules of a kind of these (ranks, microbatches), and ``chunks`` where they may be chosen; how many."""
    count = 0
    for ranks, microbatches in sizes:
        for per_rank in chunks if SCHEDULES[name].chunks is None else (None,):
            schedule = make_schedule(name, ranks, microbatches, chunks=per_rank)
            for head in (False, True) if heads else (False,):
                check_schedule(schedule, head=head)
            count += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.schedules", description=__doc__)
    parser.add_argument("--ranks", type=int, default=RANKS, help="up to so many (%(default)s)")
    parser.add_argument("--microbatches", type=int, default=MICROBATCHES, help="up to so many (%(default)s)")
    options = parser.parse_args()
    begin, total = time.monotonic(), 0
    sizes = [(p, m) for p in range(1, options.ranks + 1) for m in range(1, options.microbatches + 1)]
    for name in SCHEDULES:
        count = check_sizes(name, sizes)
        total += count
        bubble = simulate(make_schedule(name, options.ranks, options.microbatches)).bubble
        print(f"{name}: {count} schedules, bubble of the largest {100 * bubble:.2f} %", flush=True)
    print(f"all {total:,} schedules are correct, {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
