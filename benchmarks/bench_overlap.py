"""How much of the communication hides behind a backward of the same length: gloo and ours, dense, over shaped links.

``python -m benchmarks.bench_overlap`` takes 8 buckets of 4 MiB on 2 nodes x 1 rank at 200 Mbit/s, a core each. A
backward of T and a communication of T take T + one bucket at best: the last bucket leaves when the backward has
ended. Needs root.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.cluster import Cluster, ClusterError
from benchmarks.table import table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_overlap", description=__doc__)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--per-node", type=int, default=1, help="ranks per node (default 1)")
    parser.add_argument("--rate", default="200mbit", help="rate of the links (default 200mbit)")
    parser.add_argument("--buckets", type=int, default=8)
    parser.add_argument("--mib", type=float, default=4, help="MiB of fp32 per bucket (default 4)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", default="gloo,hybridcomm")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def _row(line: dict[str, Any], buckets: int) -> list[str]:
    alone, compute = line["communication_s"], line["compute_s"]
    limit = compute + alone / buckets
    exposed = line["overlapped_s"] - compute
    figures = [alone, line["communication_cpu_s"], compute, line["overlapped_s"], limit, exposed]
    share = f"{exposed / alone:.0%}"
    return [line["peer"], *(f"{s * 1e3:.0f}" for s in figures), share, f"{line['overlapped_s'] / limit:.3f}"]


def main() -> int:
    """Build the cluster, measure, print the table."""
    arguments = _arguments()
    argv = [sys.executable, "-m", "benchmarks.overlap_worker", "--peers", arguments.peers]
    argv += [
        "--buckets",
        str(arguments.buckets),
        "--mib",
        str(arguments.mib),
        "--rounds",
        str(arguments.rounds),
    ]
    try:
        with Cluster(arguments.nodes, arguments.per_node, arguments.rate, pin=True) as cluster:
            lines = [json.loads(line) for line in cluster.run(argv, timeout=900).stdout[0].splitlines()]
            shape = cluster.shape
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{arguments.buckets} buckets of {arguments.mib:g} MiB, {arguments.nodes} x {arguments.per_node} ranks; {shape}"
    )
    print(
        f"ms, medians of {arguments.rounds} rounds; limit: backward + one bucket; exposed: overlapped - backward"
    )
    header = [
        "peer",
        "comm alone",
        "its CPU",
        "backward",
        "overlapped",
        "limit",
        "exposed",
        "of comm",
        "x limit",
    ]
    print(table(header, [_row(line, arguments.buckets) for line in lines]))
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({**vars(arguments), "json": None, "lines": lines}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
