"""Checks schedules of every kind over a grid of sizes: ``python -m tests.schedules`` checks all up to 16 x 64.

Each is checked as written, and lowered with a split head and uneven buckets; the channels of the lowered lists hold
as few messages as the kind needs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from train.errors import TrainError
from train.pipeline import SCHEDULES, PipelineSchedule, check, lower, make_schedule

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


def _of_ranks(task: tuple[str, int, int]) -> tuple[str, int]:
    name, ranks, microbatches = task
    return name, check_sizes(name, [(ranks, number) for number in range(1, microbatches + 1)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.schedules", description=__doc__)
    parser.add_argument("--ranks", type=int, default=RANKS, help="up to so many (%(default)s)")
    parser.add_argument("--microbatches", type=int, default=MICROBATCHES, help="up to so many (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES), help="kinds")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)"
    )
    options = parser.parse_args()
    begin, counts = time.monotonic(), Counter[str]()
    tasks = [(name, p, options.microbatches) for name in options.only for p in range(1, options.ranks + 1)]
    with multiprocessing.Pool(options.jobs) as pool:
        for name, count in pool.imap(_of_ranks, tasks):
            counts[name] += count
            print(f"{name}: {counts[name]:,} schedules are correct", flush=True)
    print(f"all {counts.total():,} schedules are correct, {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
