"""From which size on does compression pay? Predicted by probe and cost model, against measured, per rate of the link.

``python -m benchmarks.bench_crossover`` takes 2 nodes x 2 ranks at four rates, sizes from 16 KiB to 16 MiB, and prints
for each: dense and compressed ms as predicted and as measured, what ``compress="auto"`` decides, and whether that was
right (compression has to gain `auto.GAIN`). Below each table the size at which both take equally long. A link that
the machine cannot drive at its rate is measured as it is, and said. Needs root.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import hybridcomm
from benchmarks.cluster import Cluster, ClusterError, RateError
from benchmarks.table import table
from hybridcomm.auto import GAIN, policy_of
from hybridcomm.bench.cases import Case
from hybridcomm.bench.measure import measure

__all__ = ["Line", "crossover"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One size; times in ms."""

    nbytes: int
    predicted_dense: float
    predicted_compressed: float
    measured_dense: float
    measured_compressed: float
    decision: str

    @property
    def right(self) -> bool:
        """Whether the decision is the one that the measured times ask for."""
        return (self.decision != "none") == (self.measured_compressed < GAIN * self.measured_dense)

    @property
    def lost(self) -> float:
        """What the decision takes beyond the faster of the two, in ms."""
        took = self.measured_dense if self.decision == "none" else self.measured_compressed
        return took - min(self.measured_dense, self.measured_compressed)


def crossover(lines: Sequence[Line], kind: str) -> float | None:
    """Bytes at which dense and compressed take equally long; None where one is faster throughout.

    ``kind``: "predicted" or "measured". Between sizes the ratio of times is a power of the size.
    """
    gains = [
        (line.nbytes, math.log(getattr(line, f"{kind}_dense") / getattr(line, f"{kind}_compressed")))
        for line in lines
    ]
    for (small, below), (large, above) in pairwise(gains):
        if below < 0 <= above:
            share = -below / (above - below)
            return float(small * (large / small) ** share)
    return None


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_crossover", description=__doc__)
    parser.add_argument("--rates", nargs="+", default=["200mbit", "1gbit", "5gbit", "20gbit"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 256, 1024, 4096, 16384], help="KiB")
    parser.add_argument("--codec", default="topk:0.01", help="default topk:0.01")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--per-node", type=int, default=2, help="ranks per node (default 2)")
    parser.add_argument(
        "--iters", type=int, default=15, help="timed calls of each kind and size (default 15)"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args(argv)


def _measure(arguments: argparse.Namespace) -> None:
    """What each rank runs; rank 0 prints one JSON line per size, and before them the figures of the probe."""
    with hybridcomm.Context.connect() as context:
        policy = policy_of(context, f"auto:{arguments.codec}")
        (codec,) = policy.candidates
        if context.rank == 0:
            print(json.dumps({"figures": str(policy.figures)}), flush=True)
        for kib in arguments.sizes:
            numel = kib * 256
            decision = policy.decide(numel)
            counts = {"iters": arguments.iters, "warmup": 3, "checks": 0}
            seconds = {}
            for text in ("none", str(codec)):
                case = Case(collective="allreduce", numel=numel, dtype="float32", op="sum", compress=text)
                seconds[text] = measure(context, case, **counts).seconds
            line = Line(
                nbytes=4 * numel,
                predicted_dense=decision.seconds["none"] * 1e3,
                predicted_compressed=decision.seconds[str(codec)] * 1e3,
                measured_dense=seconds["none"] * 1e3,
                measured_compressed=seconds[str(codec)] * 1e3,
                decision=decision.active,
            )
            if context.rank == 0:
                print(json.dumps(vars(line)), flush=True)


_HEADER = ["size KiB", "dense ms", "predicted", "compressed ms", "predicted", "auto", "right", "lost ms"]


def _report(title: str, lines: Sequence[Line]) -> str:
    rows = [
        [
            f"{line.nbytes / 1024:g}",
            f"{line.measured_dense:.3f}",
            f"{line.predicted_dense:.3f}",
            f"{line.measured_compressed:.3f}",
            f"{line.predicted_compressed:.3f}",
            "dense" if line.decision == "none" else "compress",
            "yes" if line.right else "no",
            f"{line.lost:.3f}",
        ]
        for line in lines
    ]
    found = (crossover(lines, kind) for kind in ("predicted", "measured"))
    at = ["none in this range" if nbytes is None else f"{nbytes / 1024:.0f} KiB" for nbytes in found]
    return f"\n{title}\n{table(_HEADER, rows)}\ncrossover: predicted {at[0]}, measured {at[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Build a cluster per rate, measure, print the tables."""
    arguments = _arguments(argv)
    if "RANK" in os.environ:
        _measure(arguments)
        return 0
    command = [sys.executable, "-m", "benchmarks.bench_crossover", "--codec", arguments.codec]
    command += ["--iters", str(arguments.iters), "--sizes", *map(str, arguments.sizes)]
    results: list[dict[str, Any]] = []
    try:
        for rate in arguments.rates:
            shape, out = _run(arguments, rate, command)
            figures, *rest = (json.loads(text) for text in out)
            lines = [Line(**fields) for fields in rest]
            title = f"{arguments.codec}, {arguments.nodes} nodes x {arguments.per_node} ranks; {shape}"
            print(f"{_report(title, lines)}\n{figures['figures']}", flush=True)
            results.append({"rate": rate, **figures, "lines": [_fields(line) for line in lines]})
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _run(arguments: argparse.Namespace, rate: str, command: Sequence[str]) -> tuple[str, list[str]]:
    """(how the links were shaped, what rank 0 printed)."""
    for verify in (True, False):
        try:
            with Cluster(arguments.nodes, arguments.per_node, rate, verify=verify) as cluster:
                done = cluster.run(command, timeout=600).check()
                return str(cluster.shape) + ("" if verify else ", NOT REACHED"), done.stdout[0].splitlines()
        except RateError as error:
            print(f"note: {error}", file=sys.stderr)
    raise ClusterError(f"no cluster at {rate}")


def _fields(line: Line) -> dict[str, Any]:
    return {**vars(line), "right": line.right, "lost": line.lost}


if __name__ == "__main__":
    sys.exit(main())
