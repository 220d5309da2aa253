"""Pipeline schedules with emulated computation and real messages: bubbles as measured beside those simulated.

``python -m benchmarks.bench_schedules`` plays each schedule on 4 ranks, whose stages sleep: a rank's forward takes
20 ms, I and W as much each, shared out over the rank's stages. Activations of 256 KiB go between ranks for real. Nobody
computes, so more ranks than cores are no matter. Operations are queued as on a device (`train.pipeline.emulated`).

Two simulations stand beside: *limit* has free links; *simulated* has messages that take what one took, as measured in
the same run between two ranks that otherwise sleep.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import hybridcomm
from benchmarks.table import table
from hybridcomm.launch import launch
from hybridcomm.topology import Link, Topology
from train.pipeline import Costs, StageCost, check, lower, make_schedule, simulate
from train.pipeline.emulated import EmulatedRuntime

__all__ = ["main", "measure", "message_seconds"]

_ROUND_TRIPS = 25


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


def message_seconds(ctx: hybridcomm.Context, options: argparse.Namespace) -> float:
    """Of an activation from rank to rank, the same on all: half of a median round trip between the first two, which
    sleep before it as they do in a schedule."""
    tensor, trips = np.zeros(256 * options.kib, dtype=np.float32), []
    for _ in range(_ROUND_TRIPS if ctx.rank < 2 else 0):
        if ctx.rank == 1:
            ctx.recv(tensor, 0)
            ctx.send(tensor, 0)
            continue
        time.sleep(1e-3 * options.forward_ms)
        begin = time.perf_counter()
        ctx.send(tensor, 1)
        ctx.recv(tensor, 1)
        trips.append(time.perf_counter() - begin)
    taken = np.array([statistics.median(trips or [0.0]) / 2])
    ctx.broadcast(taken, 0)
    return float(taken[0])


def measure(
    ctx: hybridcomm.Context, name: str, microbatches: int, message: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Medians over rounds of the slowest rank's step; bubbles as parts of it. ``message``: s of an activation."""
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
    links = replace(Topology.virtual(1, ctx.world_size), intra_node=Link(alpha=message, beta=0.0))
    limit, simulated = simulate(schedule, costs), simulate(schedule, costs, links)
    return {
        "schedule": name,
        "microbatches": microbatches,
        "measured_s": taken,
        "limit_s": limit.step_time,
        "simulated_s": simulated.step_time,
        "measured_bubble": 1 - whole / (ctx.world_size * taken),
        "limit_bubble": limit.bubble,
        "simulated_bubble": simulated.bubble,
    }


def _rank(options: argparse.Namespace) -> int:
    lines = []
    with hybridcomm.init() as ctx:
        message = message_seconds(ctx, options)
        for name in options.schedules.split(","):
            for microbatches in map(int, options.microbatches.split(",")):
                lines.append(measure(ctx, name, microbatches, message, options))
        if ctx.rank > 0:
            return 0
    print(
        f"emulated: {options.ranks} ranks, forward of a rank {options.forward_ms:g} ms, I and W as much each; "
        f"activations of {options.kib} KiB, which take {1e3 * message:.2f} ms; medians of {options.rounds} rounds"
    )
    header = [
        "schedule",
        "m",
        "step ms",
        "simulated",
        "limit",
        "bubble",
        "simulated",
        "limit",
        "points above",
    ]
    rows = [
        [
            line["schedule"],
            str(line["microbatches"]),
            *(f"{1e3 * line[name]:.1f}" for name in ("measured_s", "simulated_s", "limit_s")),
            *(f"{line[name]:.1%}" for name in ("measured_bubble", "simulated_bubble", "limit_bubble")),
            f"{100 * (line['measured_bubble'] - line['simulated_bubble']):.2f}, "
            f"{100 * (line['measured_bubble'] - line['limit_bubble']):.2f}",
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
