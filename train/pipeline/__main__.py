"""Shows a schedule: ``python -m train.pipeline --schedule zbv --ranks 4 --microbatches 8``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from train.errors import TrainError
from train.pipeline import SCHEDULES, check, lower, make_schedule, simulate, split_head

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints grid, bubble and peak activations; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.pipeline", description=__doc__)
    parser.add_argument("--schedule", choices=list(SCHEDULES), default="zbv", help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=4, help="pipeline ranks (default: %(default)s)")
    parser.add_argument("--microbatches", type=int, default=8, help="per step (default: %(default)s)")
    parser.add_argument("--chunks", type=int, help="stages per rank, for interleaved schedules")
    parser.add_argument("--split-head", action="store_true", help="split the item head over all ranks")
    parser.add_argument("--list", action="store_true", help="print the lowered lists instead")
    options = parser.parse_args(argv)
    try:
        schedule = make_schedule(options.schedule, options.ranks, options.microbatches, chunks=options.chunks)
        lowered = lower(schedule, head=options.split_head)
        report = check(lowered)
    except TrainError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    if options.list:
        print(lowered.text, end="")
        return 0
    timeline = simulate(split_head(schedule) if options.split_head else schedule)
    kind = SCHEDULES[schedule.name]
    print(f"{schedule.name} ({kind.source}): {schedule.ranks} ranks, {schedule.microbatches} microbatches")
    print(f"stage on rank {' '.join(map(str, schedule.placement))}\n")
    print(timeline.grid())
    print(f"\nbubble {100 * timeline.bubble:.1f} % of {timeline.step_time:g} slots (F = I = W = 1, B = 2)")
    print(
        f"peak activations, of one stage and microbatch, by rank: {' '.join(map(str, report.peak_activations))}"
    )
    print(f"digest {lowered.digest:016x}, as lowered")
    return 0


if __name__ == "__main__":
    sys.exit(main())
