"""What each of the two ranks of ``bench_parallel`` runs; rank 0 writes a JSON line for each comparison."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import hybridcomm
from benchmarks.parallel import ours
from benchmarks.parallel.case import Case, Competitor
from benchmarks.parallel.contest import Contest
from benchmarks.parallel.ddp import DDP, Alone
from benchmarks.parallel.dtensor import DTensorParallel
from benchmarks.parallel.pipelines import (
    TORCH_SCHEDULES,
    DeepSpeedPipeline,
    TorchPipeline,
    deepspeed_reason,
)
from benchmarks.parallel.splits import promising, unit_costs
from hybridcomm.context import Context
from hybridcomm.topology import Topology
from train.pipeline import StageCost

__all__ = ["OURS", "main"]

OURS = (
    "1f1b", "zb-h1", "zbv", "interleaved", "1f1b, split head", "zb-h1, split head", "zbv, split head",
)  # fmt: skip
"""Of our schedules those that can be the fastest on two ranks."""

Line = dict[str, Any]


def pipelines(contest: Contest, ctx: Context, options: argparse.Namespace) -> Line:
    """PP 2: every peer's best schedule, split and loss."""
    case = contest.case
    makers: dict[str, list[Callable[[], Competitor]]] = {"ours": [], "torch": [], "deepspeed": []}
    reason = deepspeed_reason()
    for tiles in (True, False):
        units = _agreed(unit_costs(case, tiles=tiles))

        def cuts(schedule: str, units: Any = units) -> list[tuple[int, ...]]:
            return promising(case, schedule, units, count=options.cuts)

        if tiles:
            makers["ours"] = [
                partial(ours.pipeline, case, ctx, name, cut) for name in OURS for cut in cuts(name)
            ]
        makers["torch"] += [
            partial(TorchPipeline, case, name, cut, tiles=tiles)
            for name in TORCH_SCHEDULES
            for cut in cuts(name)
        ]
        if reason is None:
            makers["deepspeed"] += [
                partial(DeepSpeedPipeline, case, cut, tiles=tiles) for cut in cuts("1f1b")
            ]
    finalists = [competitor for some in makers.values() for competitor in contest.best(some)]
    absent = {} if reason is None else {DeepSpeedPipeline.name: reason}
    alone = Alone(case, case.batches())
    return {"absent": absent, **_measure(contest, [*finalists, alone], options.rounds)}


def _agreed(units: tuple[StageCost, StageCost]) -> tuple[StageCost, StageCost]:
    """Rank 0's, on both: they have to run the same splits."""
    box = [units]
    dist.broadcast_object_list(box)
    return box[0]


def tensors(contest: Contest, ctx: Context, options: argparse.Namespace) -> Line:
    """TP 2: the whole step in one batch."""
    case = contest.case
    competitors = contest.best(
        [partial(ours.tensor_parallel, case, ctx, sequence=split) for split in (False, True)]
    )
    competitors += contest.best([partial(DTensorParallel, case)])
    return _measure(contest, [*competitors, Alone(case, case.joined())], options.rounds)


def replicas(contest: Contest, ctx: Context, options: argparse.Namespace) -> Line:
    """DP 2: in one node, and as two nodes that have TCP over loopback, which is what gloo has."""
    case = contest.case
    apart = Context.connect(Topology.virtual(2, 1))
    try:
        competitors: list[Competitor] = [
            ours.data_parallel(case, ctx, choice="shared memory"),
            ours.data_parallel(case, apart, choice="TCP over loopback"),
            DDP(case),
        ]
        for competitor in competitors:
            contest.check(competitor)
        layouts = competitors[0].replica.runtime.all_reducers()[0].layouts
        line = _measure(contest, competitors, options.rounds, limit=DDP(case, average=False))
        return {**line, "last_bucket_nbytes": 4 * layouts[-1].numel}
    finally:
        competitors.clear()
        gc.collect()
        apart.close()


def _measure(
    contest: Contest, competitors: list[Competitor], rounds: int, *, limit: Competitor | None = None
) -> Line:
    """The last one is the limit, unless ``limit`` is, which averages nothing: only its first loss is right."""
    last = limit or competitors.pop()
    contest.check(last, 1 if limit else 2)
    *lines, alone = contest.rounds([*competitors, last], rounds)
    return {"lines": lines, "limit": alone}


COMPARISONS = {"pp": pipelines, "tp": tensors, "dp": replicas}


def main() -> None:
    """Every comparison at every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--comparisons", required=True)
    parser.add_argument("--items", required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--microbatches", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--cuts", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(os.environ["HYBRIDCOMM_STORE"]) / "gloo"), 2)
    dist.init_process_group(
        "gloo", store=store, rank=int(os.environ["RANK"]), world_size=2, timeout=timedelta(seconds=300)
    )
    ctx = hybridcomm.init()
    for items in map(int, options.items.split(",")):
        case = Case(
            items=items, layers=options.layers, dim=options.dim, rows=options.rows,
            microbatches=options.microbatches,
        )  # fmt: skip
        contest = Contest(case=case)
        for name in options.comparisons.split(","):
            line = COMPARISONS[name](contest, ctx, options)
            if ctx.rank == 0:
                with options.out.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"comparison": name, "items": items, **line}) + "\n")
                print(f"  {name} {items} items: done", file=sys.stderr, flush=True)
            gc.collect()
    hybridcomm.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
