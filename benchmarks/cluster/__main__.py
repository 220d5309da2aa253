"""Run a command on every rank of a virtual cluster, given after ``--``, with torchrun's environment."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from benchmarks.cluster.cluster import Cluster
from benchmarks.cluster.errors import ClusterError
from benchmarks.cluster.ranks import Result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("--nodes", type=int, default=2, help="virtual nodes (default 2)")
    parser.add_argument(
        "--per-node", default="2", help="ranks per node: one number, or one per node such as 2+1+1"
    )
    parser.add_argument("--rate", default="1gbit", help="rate of each link, or 'none' (default 1gbit)")
    parser.add_argument("--burst", type=int, help="the shaper's burst in bytes (default 1 ms of the rate)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the whole run (default 600)")
    parser.add_argument("--pin", action="store_true", help="give each node its own share of the cores")
    parser.add_argument("--first", action="store_true", help="print rank 0's output only, as it is")
    parser.add_argument("--json", type=Path, help="write exit codes, seconds and bytes by node to this file")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what every rank runs"
    )
    arguments = parser.parse_args()
    if arguments.command[:1] == ["--"]:
        arguments.command = arguments.command[1:]
    if not arguments.command:
        parser.error("no command: write it after --")
    return arguments


def _report(result: Result) -> None:
    for node, (sent, received) in enumerate(zip(result.tx_bytes, result.rx_bytes, strict=True)):
        print(f"node{node}: sent {sent:,} B, received {received:,} B by interface counters", file=sys.stderr)


def main() -> int:
    """Build the cluster, run the command, tear down; 0 only when every rank ended with 0."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    counts = [int(part) for part in arguments.per_node.split("+")]
    rate = None if arguments.rate == "none" else arguments.rate
    try:
        with Cluster(
            arguments.nodes,
            counts[0] if len(counts) == 1 else counts,
            rate,
            burst=arguments.burst,
            pin=arguments.pin,
        ) as cluster:
            print(
                f"{arguments.nodes} nodes, {cluster.world_size} ranks; {cluster.shape or 'unshaped'}",
                file=sys.stderr,
            )
            for done in cluster.checks:
                print(
                    f"node{done.source} -> node{done.target}: {done.rate / 1e6:.0f} Mbit/s measured",
                    file=sys.stderr,
                )
            result = cluster.run(
                arguments.command,
                timeout=arguments.timeout,
                check=False,
                live="first" if arguments.first else "all",
            )
            _report(result)
            if arguments.json is not None:
                keys = ("exit_codes", "seconds", "tx_bytes", "rx_bytes", "timed_out")
                arguments.json.write_text(json.dumps({key: getattr(result, key) for key in keys}) + "\n")
            result.check()
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
