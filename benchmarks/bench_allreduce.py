"""All-reduce between shaped nodes: gloo, DDP's hooks and ours in one run, interleaved, beside the wire limit.

``python -m benchmarks.bench_allreduce`` takes 64 MiB of fp32 on 2 nodes x 2 ranks at 1 Gbit/s. Needs root.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cluster import Cluster, ClusterError
from benchmarks.table import table
from benchmarks.timing import wire_limit

_PEERS = "gloo,fp16,powersgd,topk-naive,ours,ours-topk,ours-reducer"
_BASELINE = {"ours": "ours", "gloo": "ours", "gloo-hierarchical": "ours", "ours-topk": "ours-topk"}
"""Which of our lines a peer is compared with; those not named, DDP's hooks, with our Reducer."""
_DENSE = ("gloo", "gloo-hierarchical", "ours")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_allreduce", description=__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[64], help="MiB of fp32 (default 64)")
    parser.add_argument("--rates", nargs="+", default=["1gbit"], help="rates of the links (default 1gbit)")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--per-node", default="2", help="ranks per node, or one number per node: 2+1+1")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each peer (default 7)")
    parser.add_argument("--calls", type=int, default=1, help="dense calls back to back in each (default 1)")
    parser.add_argument(
        "--peers", default=_PEERS, help=f"comma-separated (default {_PEERS}; also ddp, gloo-hierarchical)"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def _row(line: dict[str, Any], result: dict[str, Any], limit: float) -> list[str]:
    ms, by_key = line["ms"], {other["key"]: other["ms"]["median"] for other in result["lines"]}
    ours = by_key.get(_BASELINE.get(line["key"], "ours-reducer"))
    dense = line["key"] in _DENSE
    engine = line["engine_bytes"]
    return [
        line["name"],
        f"{ms['median']:.2f}",
        f"{ms['least']:.2f}",
        f"{ms['greatest']:.2f}",
        f"{ours:.1f}" if ours is not None else "",
        f"{ms['median'] / ours:.2f}" if ours is not None else "",
        f"{ms['median'] / 1e3 / limit:.2f}" if dense and limit else "",
        f"{line['counted_bytes'] / 1e6:.2f}",
        f"{engine / 1e6:.2f}" if engine else "",
        f"{line['counted_bytes'] / engine:.3f}" if engine else "",
    ]


_HEADER = [
    "peer",
    "ms",
    "min",
    "max",
    "ours ms",
    "ratio",
    "x limit",
    "MB counted",
    "MB engine",
    "counted/engine",
]


def _print(result: dict[str, Any], cluster: Cluster) -> None:
    shape = cluster.shape
    limit = wire_limit(len(cluster.ranks_of), result["numel"] * 4, shape.rate) if shape is not None else 0.0
    result["limit_ms"] = limit * 1e3
    layout = "+".join(map(str, cluster.ranks_of))
    calls = f" of {result['calls']} calls back to back" if result["calls"] > 1 else ""
    print(f"\n{result['numel'] * 4 / 2**20:g} MiB fp32, ranks {layout}; {shape or 'unshaped'}")
    print(f"dense wire limit 2(M-1)/M * S/rate = {limit * 1e3:.2f} ms; ", end="")
    print(f"{result['rounds']} interleaved rounds{calls}")
    rows = [_row(line, result, limit) for line in result["lines"] if line["key"] != "local"]
    print(table(_HEADER, rows), flush=True)


def measure(
    cluster: Cluster, *, peers: str, sizes: Sequence[float], rounds: int, calls: int = 1
) -> list[dict[str, Any]]:
    """Time ``peers`` on a cluster, print a table per size (MiB), and return what was measured."""
    argv = [sys.executable, "-m", "benchmarks.allreduce_worker", "--peers", peers, "--rounds", str(rounds)]
    argv += ["--calls", str(calls), "--sizes", *map(str, sizes)]
    done = cluster.run(argv, timeout=900)
    results = []
    for line in done.stdout[0].splitlines():
        rate = cluster.shape.rate if cluster.shape is not None else None
        result = {"rate": rate, "ranks_of": cluster.ranks_of, **json.loads(line)}
        _print(result, cluster)
        results.append(result)
    return results


def main() -> int:
    """Build a cluster per rate, measure, print the tables."""
    arguments = _arguments()
    counts = [int(part) for part in arguments.per_node.split("+")]
    per_node = counts[0] if len(counts) == 1 else counts
    results: list[dict[str, Any]] = []
    try:
        for rate in arguments.rates:
            with Cluster(arguments.nodes, per_node, None if rate == "none" else rate) as cluster:
                results += measure(
                    cluster,
                    peers=arguments.peers,
                    sizes=arguments.sizes,
                    rounds=arguments.rounds,
                    calls=arguments.calls,
                )
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
