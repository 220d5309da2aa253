"""The same training over shaped links, ours beside torch DDP: step time, exposed communication, bytes.

``python -m benchmarks.bench_training`` trains a model of 5 million parameters on 2 nodes x 2 ranks at
1 Gbit/s. Bytes per step by interface counters are the difference of a long and a short run over that of their
steps, which takes out start-up, weights sent at the start, and evaluation; ``headers`` is the part that
packet headers and acknowledgements take. Needs root.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.cluster import Cluster, ClusterError
from benchmarks.cluster.shape import PACKET_HEADERS
from benchmarks.runs import TrainingRun
from benchmarks.table import table

_VARIANTS: dict[str, tuple[str, list[str]]] = {
    "ddp": ("torch DDP, gloo", ["--comm", "ddp", "--compress", "none"]),
    "ddp-fp16": ("torch DDP, fp16 hook", ["--comm", "ddp", "--compress", "none", "--wire.ddp-hook", "fp16"]),
    "ddp-powersgd": (
        "torch DDP, PowerSGD rank 1",
        ["--comm", "ddp", "--compress", "none", "--wire.ddp-hook", "powersgd"],
    ),
    "dense": ("hybridcomm, dense", ["--comm", "hybridcomm", "--compress", "none"]),
    "topk": ("hybridcomm, top-k 1 %", ["--comm", "hybridcomm", "--compress", "topk:0.01"]),
}
_SHORT = 2
_AGREEMENT = 0.07


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_training", description=__doc__)
    parser.add_argument("--data", type=Path, help="data directory (default: generated data)")
    parser.add_argument("--preset", default="speed", help="settings of train.run (default speed)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run (default 40)")
    parser.add_argument("--variants", default="ddp,dense,topk", help=f"of {','.join(_VARIANTS)}")
    parser.add_argument("--rate", default="1gbit", help="rate of each link (default 1gbit)")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--per-node", type=int, default=2, help="ranks per node (default 2)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    unknown = set(arguments.variants.split(",")) - set(_VARIANTS)
    if unknown:
        parser.error(f"--variants: unknown {', '.join(sorted(unknown))}; there are {', '.join(_VARIANTS)}")
    if arguments.steps <= _SHORT:
        parser.error(f"--steps: more than {_SHORT}, the length of the short run")
    return arguments


def _run(cluster: Cluster, options: list[str], steps: int) -> tuple[TrainingRun, int, int]:
    """(the run, bytes and packets all nodes sent) of one training of ``steps`` steps."""
    with tempfile.TemporaryDirectory(prefix="bench-training-") as name:
        run_dir = Path(name) / "run"
        length = ["--max-steps", str(steps), "--epochs", "1000", "--eval-every", "1000"]
        argv = [sys.executable, "-m", "train.run", *options, *length, "--run-dir", str(run_dir)]
        result = cluster.run(argv, timeout=600)
        run = TrainingRun.read(run_dir)
    if run is None:
        raise ClusterError(f"the run left no final metrics\n{result.stdout[0]}\n{result.stderr[0]}")
    return run, sum(result.tx_bytes), sum(result.tx_packets)


def _measure(cluster: Cluster, key: str, base: list[str], steps: int) -> dict[str, Any]:
    name, options = _VARIANTS[key]
    _, short, short_packets = _run(cluster, [*base, *options], _SHORT)
    run, long, long_packets = _run(cluster, [*base, *options], steps)
    counted = (long - short) / (steps - _SHORT)
    headers = (long_packets - short_packets) / (steps - _SHORT) * PACKET_HEADERS
    engine = run.final["wire_nbytes_per_step"]
    return {
        "key": key,
        "name": name,
        "step_ms": run.step_ms,
        "exposed_ms": run.exposed_ms,
        "loss": run.final["loss"],
        "ndcg": run.final["ndcg"],
        "hr": run.final["hr"],
        "samples_per_second": run.final["samples_per_second"],
        "counted_bytes": counted,
        "header_bytes": headers,
        "engine_bytes": engine,
        "agreement": counted / engine - 1 if engine else None,
    }


def _row(line: dict[str, Any], ddp: dict[str, Any] | None) -> list[str]:
    engine, agreement = line["engine_bytes"], line["agreement"]
    return [
        line["name"],
        f"{line['step_ms']:.0f}",
        f"{line['exposed_ms']:.1f}",
        f"{100 * line['exposed_ms'] / ddp['exposed_ms']:.0f} %" if ddp else "",
        f"{line['loss']:.3f}",
        f"{line['ndcg']:.4f}",
        f"{line['counted_bytes'] / 1e6:.3f}",
        f"{line['header_bytes'] / 1e6:.3f}",
        f"{engine / 1e6:.3f}" if engine else "",
        f"{100 * agreement:+.1f} %" if agreement is not None else "",
    ]


_HEADER = [
    "training",
    "step ms",
    "exposed ms",
    "of DDP's",
    "loss",
    "NDCG@10",
    "MB/step counted",
    "headers",
    "engine",
    "off",
]


def main() -> int:
    """Build the cluster, train each variant, print the table; 1 when counters and engine disagree."""
    arguments = _arguments()
    base = ["--preset", arguments.preset]
    if arguments.data is not None:
        base += ["--data", str(arguments.data.resolve())]
    lines = []
    try:
        with Cluster(arguments.nodes, arguments.per_node, arguments.rate) as cluster:
            ranks = f"{arguments.nodes} nodes x {arguments.per_node} ranks"
            print(f"{ranks}; {cluster.shape}; preset {arguments.preset}, {arguments.steps} steps", flush=True)
            for key in arguments.variants.split(","):
                lines.append(_measure(cluster, key, base, arguments.steps))
                print(
                    f"  {lines[-1]['name']}: {lines[-1]['step_ms']:.0f} ms/step", file=sys.stderr, flush=True
                )
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    ddp = next((line for line in lines if line["key"] == "ddp"), None)
    print(table(_HEADER, [_row(line, ddp) for line in lines]))
    if arguments.json is not None:
        report = {
            "rate": arguments.rate,
            "steps": arguments.steps,
            "preset": arguments.preset,
            "lines": lines,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    off = [
        line["name"]
        for line in lines
        if line["agreement"] is not None and abs(line["agreement"]) > _AGREEMENT
    ]
    if off:
        print(
            f"counters and engine disagree by more than {_AGREEMENT:.0%}: {', '.join(off)}", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
