"""Data, tensor and pipeline parallelism alone, together, and compressed, on an emulated cluster of slow links.

``python -m benchmarks.bench_hybrid`` plays one training step of the same model on 4 nodes x 2 ranks at 1 Gbit/s under
each composition (``train.run --emulate``): computation is time that passes, so two cores carry eight ranks, and all
communication is real, over shaped links. Figures are *emulated*. *predicted* is the simulator's, from the same costs
and the links that it measured. *communication*: what ranks wait for it, as a part of the step. Needs root.

Tensor parallelism stays inside a node, as everywhere in this project: with two ranks a node, "TP" is 2 x DP 4.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cluster import Cluster, ClusterError
from benchmarks.table import table

__all__ = ["COMPOSITIONS", "Composition", "emulated", "main"]


@dataclass(frozen=True, kw_only=True)
class Composition:
    """``tp`` x ``pp`` ranks hold a model, the others are replicas."""

    name: str
    tp: int = 1
    pp: int = 1
    compress: str = "none"

    def options(self, microbatches: int) -> list[str]:
        """Of ``train.run``: as many microbatches in a step everywhere, shared out over the replicas."""
        options = ["--tp", str(self.tp), "--pp", str(self.pp), "--compress", self.compress]
        return [*options, "--microbatches", str(microbatches)] if self.pp > 1 else options


COMPOSITIONS = {
    "dp": Composition(name="DP only"),
    "tp": Composition(name="TP, in the node", tp=2),
    "pp": Composition(name="PP only", pp=8),
    "hybrid": Composition(name="hybrid", tp=2, pp=2),
    "hybrid-topk": Composition(name="hybrid, top-k 1 %", tp=2, pp=2, compress="topk:0.01"),
    "dp-topk": Composition(name="DP only, top-k 1 %", compress="topk:0.01"),
}
_DEFAULT = "dp,tp,pp,hybrid,hybrid-topk"


def emulated(run_dir: Path) -> dict[str, Any]:
    """The figures that a run of ``--emulate`` leaves; ClusterError when there are none."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for event in map(json.loads, lines):
        if event["event"] == "emulated":
            return event
    raise ClusterError(f"{file}: the run left no emulated figures; does this train.run know --emulate?")


def _measure(cluster: Cluster, composition: Composition, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-hybrid-") as folder:
        run_dir = Path(folder) / "run"
        argv = [sys.executable, "-m", "train.run", "--emulate", str(1e-3 * arguments.layer_ms)]
        argv += ["--max-steps", str(arguments.steps), "--batch-size", str(arguments.users)]
        for name, value in (("layers", arguments.layers), ("dim", 256), ("heads", 4), ("hidden", 688)):
            argv += [f"--model.{name}", str(value)]
        argv += ["--synthetic.items", str(arguments.items), "--outer", "dp", "--run-dir", str(run_dir)]
        cluster.run([*argv, *composition.options(arguments.microbatches)], timeout=arguments.timeout)
        event = emulated(run_dir)
    world = cluster.world_size
    mesh = f"{composition.tp} x {composition.pp} x {world // (composition.tp * composition.pp)}"
    return {"name": composition.name, "mesh": mesh, "compress": composition.compress, **event}


_HEADER = [
    "emulated", "tp x pp x dp", "iteration ms", "predicted ms", "off", "communication", "bubble", "utilisation",
    "predicted", "speed-up",
]  # fmt: skip


def _row(line: dict[str, Any], first: dict[str, Any]) -> list[str]:
    measured, predicted = line["step_seconds"], line["predicted_step_seconds"]
    return [
        line["name"],
        line["mesh"],
        f"{1e3 * measured:.0f}",
        f"{1e3 * predicted:.0f}",
        f"{100 * (measured / predicted - 1):+.0f} %",
        f"{100 * line['communication_share']:.0f} %",
        f"{100 * line['bubble_share']:.0f} %",
        f"{100 * line['utilisation']:.0f} %",
        f"{100 * line['predicted_utilisation']:.0f} %",
        f"{first['step_seconds'] / measured:.2f}",
    ]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_hybrid", description=__doc__)
    parser.add_argument("--compositions", default=_DEFAULT, help=f"of {','.join(COMPOSITIONS)}")
    parser.add_argument("--rate", default="1gbit", help="rate of each link (default %(default)s)")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--items", type=int, default=8000)
    parser.add_argument("--users", type=int, default=512, help="in a step (default %(default)s)")
    parser.add_argument(
        "--microbatches", type=int, default=16, help="of a pipeline, in a step (default %(default)s)"
    )
    parser.add_argument(
        "--layer-ms",
        type=float,
        default=10,
        help="of a layer's forward per 1,000 tokens (default %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--timeout", type=float, default=600, help="s for each composition")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.compositions.split(",")) - set(COMPOSITIONS)
    if unknown:
        parser.error(
            f"--compositions: unknown {', '.join(sorted(unknown))}; there are {', '.join(COMPOSITIONS)}"
        )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Plays each composition on one cluster, prints the table; 1 when one fails."""
    arguments = _arguments(argv)
    lines = []
    try:
        with Cluster(4, 2, arguments.rate) as cluster:
            print(
                f"emulated: 4 nodes x 2 ranks; {cluster.shape}; {arguments.layers} layers of width 256, "
                f"{arguments.items} items, {arguments.users} users a step, a layer's forward takes "
                f"{arguments.layer_ms:g} ms per 1,000 tokens; medians of {arguments.steps} steps",
                flush=True,
            )
            for name in arguments.compositions.split(","):
                lines.append(_measure(cluster, COMPOSITIONS[name], arguments))
                print(f"  {lines[-1]['name']}: done", file=sys.stderr, flush=True)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(_HEADER, [_row(line, lines[0]) for line in lines]))
    if arguments.json is not None:
        report = {**vars(arguments), "json": None, "lines": lines}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
