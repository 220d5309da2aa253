"""Pipeline schedules with emulated computation and real messages: bubbles as measured beside those simulated.

``python -m benchmarks.bench_schedules`` plays each schedule on 4 ranks, whose stages sleep: a rank's forward takes
20 ms, I and W as much each, shared out over the rank's stages. Activations of 256 KiB go between ranks for real. Nobody
computes, so more ranks than cores are no matter. Operations are queued as on a device (`train.pipeline.emulated`). The
simulated bubble has free links: it is the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hybridcomm
from benchmarks.table import table
from hybridcomm.launch import launch
from train.pipeline import Costs, StageCost, check, lower, make_schedule, simulate
from train.pipeline.emulated import EmulatedRuntime

__all__ = ["main", "measure"]


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_schedules", description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--schedules", default="gpipe,1f1b,interleaved,zb-h1,zbv,dualpipev")
    parser.add_argument("--microbatches", default="8,16,32")
    parser.add_argument("--forward-ms", type=float, default=20, help="of a rank (default %(default)s)")
    parser.add_argument("--kib", type=int, default=256, help="of an activation (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args(argv)


def measure(
    ctx: hybridcomm.Context, name: str, microbatches: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Medians over rounds of the slowest rank's step; bubbles as parts of it."""
    schedule = lower(make_schedule(name, ctx.world_size, microbatches))
    check(schedule)
    part = 1e-3 * options.forward_ms * ctx.world_size / schedule.stages
    cost = StageCost(forward=part, input_grad=part, weight_grad=part, nbytes=1024 * options.kib)
    costs = Costs(stages=(cost,) * schedule.stages)
    runtime = EmulatedRuntime(schedule, ctx.rank, costs, group=ctx)
    seconds = []
    for _ in range(options.rounds + 1):
        ctx.barrier()
        step = runtime.step()
        slowest, work = np.array([step.seconds]), np.array([step.work])
        ctx.allreduce(slowest, op="max")
        ctx.allreduce(work, op="sum")
        seconds.append(float(slowest[0]))
    taken, whole = statistics.median(seconds[1:]), float(work[0])
    limit = simulate(schedule, costs)
    return {
        "schedule": name,
        "microbatches": microbatches,
        "measured_s": taken,
        "simulated_s": limit.step_time,
        "measured_bubble": 1 - whole / (ctx.world_size * taken),
        "simulated_bubble": limit.bubble,
    }


def _rank(options: argparse.Namespace) -> int:
    lines = []
    with hybridcomm.init() as ctx:
        for name in options.schedules.split(","):
            for microbatches in map(int, options.microbatches.split(",")):
                lines.append(measure(ctx, name, microbatches, options))
        if ctx.rank > 0:
            return 0
    print(
        f"emulated: {options.ranks} ranks, forward of a rank {options.forward_ms:g} ms, I and W as much each; "
        f"activations of {options.kib} KiB; medians of {options.rounds} rounds"
    )
    header = ["schedule", "m", "step ms", "simulated ms", "bubble", "simulated", "points above"]
    rows = [
        [
            line["schedule"],
            str(line["microbatches"]),
            f"{1e3 * line['measured_s']:.1f}",
            f"{1e3 * line['simulated_s']:.1f}",
            f"{line['measured_bubble']:.1%}",
            f"{line['simulated_bubble']:.1%}",
            f"{100 * (line['measured_bubble'] - line['simulated_bubble']):.2f}",
        ]
        for line in lines
    ]
    print(table(header, rows))
    if options.json is not None:
        options.json.write_text(json.dumps({**vars(options), "json": None, "lines": lines}, indent=1) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the ranks; as one of them, measures."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _arguments(arguments)
    if "RANK" in os.environ:
        return _rank(options)
    return launch(["-m", "benchmarks.bench_schedules", *arguments], nproc=options.ranks)


if __name__ == "__main__":
    sys.exit(main())
