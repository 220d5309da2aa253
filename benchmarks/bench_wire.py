"""Dense all-reduce against the wire limit, on many layouts: gloo, gloo by hand in three steps, ours.

``python -m benchmarks.bench_wire`` runs the cases below, one virtual cluster each. Needs root.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench_allreduce import measure
from benchmarks.cluster import Cluster, ClusterError
from benchmarks.table import table

_GLOO, _BOTH_GLOOS = "gloo,ours", "gloo,gloo-hierarchical,ours"


@dataclass(frozen=True, kw_only=True)
class Case:
    """``ranks_of``: ranks of each node; ``mib``: of fp32; ``calls``: back to back in each timed round."""

    ranks_of: tuple[int, ...]
    mib: float
    peers: str
    rate: str = "1gbit"
    calls: int = 1
    rounds: int = 5


CASES = (
    Case(ranks_of=(2, 2), mib=64, peers=_GLOO, rounds=7),
    Case(ranks_of=(2, 2), mib=64, peers=_GLOO, rate="200mbit", rounds=3),
    Case(ranks_of=(2, 2, 2, 2), mib=64, peers=_GLOO),
    Case(ranks_of=(4, 4), mib=64, peers=_BOTH_GLOOS),
    Case(ranks_of=(2, 1, 1), mib=63.00001, peers=_GLOO),
    Case(ranks_of=(2, 2), mib=1, peers=_GLOO, calls=20, rounds=7),
    Case(ranks_of=(2, 2, 2, 2), mib=1, peers=_GLOO, calls=20, rounds=7),
)


def _row(result: dict[str, Any]) -> list[str]:
    by_key = {line["key"]: line["ms"]["median"] for line in result["lines"]}
    gloo = min(ms for key, ms in by_key.items() if key != "ours")
    limit, ours = result["limit_ms"], by_key["ours"]
    name = f"{'+'.join(map(str, result['ranks_of']))}, {result['numel'] * 4 / 2**20:g} MiB, "
    name += f"{result['rate'] / 1e6:g} Mbit/s" + (", back to back" if result["calls"] > 1 else "")
    figures = [f"{gloo:.2f}", f"{ours:.2f}", f"{limit:.2f}", f"{gloo / ours:.2f}"]
    return [name, *figures, f"{gloo / limit:.2f}", f"{ours / limit:.3f}"]


def main() -> int:
    """Run the cases, print one table of all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_wire", description=__doc__)
    parser.add_argument("--only", type=int, nargs="+", help=f"numbers of cases, 0 to {len(CASES) - 1}")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    chosen = [CASES[i] for i in arguments.only] if arguments.only else CASES
    results: list[dict[str, Any]] = []
    try:
        for case in chosen:
            with Cluster(len(case.ranks_of), list(case.ranks_of), case.rate) as cluster:
                results += measure(
                    cluster, peers=case.peers, sizes=[case.mib], rounds=case.rounds, calls=case.calls
                )
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    header = [
        "ranks, size, rate",
        "best gloo ms",
        "ours ms",
        "limit ms",
        "ratio",
        "gloo x limit",
        "ours x limit",
    ]
    print("\n" + table(header, map(_row, results)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
