"""Pipeline, tensor and data parallelism on two ranks, ours beside peers: ``python -m benchmarks.bench_parallel``.

Two processes on two cores, one thread each, train one model (8 layers of width 256 by default, untied, no dropout) and
really compute. A step is forward, backward and SGD. Before anything is timed, everyone's losses of the first two steps
must be those of one process in fp64, to a computed tolerance. Peers may choose: every schedule they have, of each the
best few splits of the layers by simulation with measured costs, their own cross-entropy or our loss; so do ours. The
three best of each go into the rounds: all competitors stay loaded and warm in the same two processes, and each has one
step in turn in every round (A B C A B C ...). Figures are medians of the slower rank's times.

*limit*: for PP and TP half of what one core takes for the whole model while the other does the same; for DP the step
without averaging, and of exposed communication the time in which the memory moves the last bucket. A peer that is not
installed (`pip install deepspeed`) has a row that says so.
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

from benchmarks import native
from benchmarks.table import table
from hybridcomm.launch import launch

__all__ = ["main", "rows"]

GOALS = {"PP 2": 1.0, "TP 2": 1.3, "DP 2 exposed": 2.0}
"""How many times as long the peer is to take."""
_FULL_SIZE = 30_000
"""Items from which the goal of TP counts."""
_HEADER = [
    "two ranks",
    "peer",
    "its choice",
    "ms",
    "our choice",
    "ours ms",
    "peer / ours",
    "goal",
    "limit",
    "x limit",
]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A median in ms and what was chosen."""

    name: str
    choice: str
    ms: float


def _best(lines: list[dict[str, Any]], name: str, figure: str) -> Figure | None:
    """The fastest of a competitor's finalists."""
    own = [
        Figure(name=name, choice=line["choice"], ms=line[figure]) for line in lines if line["name"] == name
    ]
    return min(own, key=lambda each: each.ms, default=None)


def _row(what: str, peer: Figure, ours: Figure, limit: float | None, goal: float | None) -> list[str]:
    ratio = peer.ms / ours.ms if ours.ms else float("inf")
    verdict = "" if goal is None else f"{goal:g} {'met' if ratio >= goal else 'missed'}"
    bound = [f"{limit:.1f}", f"{ours.ms / limit:.2f}"] if limit else ["", ""]
    return [
        what, peer.name, peer.choice, f"{peer.ms:.1f}", ours.choice, f"{ours.ms:.1f}", f"{ratio:.2f}", verdict, *bound
    ]  # fmt: skip


def rows(result: dict[str, Any], floor_ms: float | None = None) -> list[list[str]]:
    """The table's rows of one comparison; ``floor_ms`` of exposed communication."""
    kind, items, lines = result["comparison"].upper() + " 2", result["items"], result["lines"]
    what = f"{kind}, {items:,} items"
    peers = list(dict.fromkeys(line["name"] for line in lines if line["name"] != "hybridcomm"))
    out = []
    if kind == "DP 2":
        for line in lines:
            if line["name"] != "hybridcomm":
                continue
            for figure, label, limit in (
                ("ms", "step", result["limit"]["ms"]),
                ("exposed_ms", "exposed", floor_ms),
            ):
                ours = Figure(name="hybridcomm", choice=line["choice"], ms=line[figure])
                goal = GOALS.get(f"{kind} {label}")
                out += [
                    _row(f"{what}, {label}", peer, ours, limit, goal)
                    for name in peers
                    if (peer := _best(lines, name, figure)) is not None
                ]
        return out
    ours = _best(lines, "hybridcomm", "ms")
    assert ours is not None
    goal = GOALS[kind] if kind != "TP 2" or items >= _FULL_SIZE else None
    for name in peers:
        peer = _best(lines, name, "ms")
        assert peer is not None
        out.append(_row(what, peer, ours, result["limit"]["ms"] / 2, goal))
    for name, reason in result.get("absent", {}).items():
        out.append([what, name, f"not compared: {reason}", *[""] * (len(_HEADER) - 3)])
    return out


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_parallel", description=__doc__)
    parser.add_argument("--comparisons", default="pp,tp,dp")
    parser.add_argument("--items", default="2000,30000", help="sizes of the catalogue (default %(default)s)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument(
        "--rows", type=int, default=4, help="of 64 tokens, in a microbatch (default %(default)s)"
    )
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--cuts", type=int, default=3, help="splits run of each schedule (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.comparisons.split(",")) - {"pp", "tp", "dp"}
    if unknown:
        parser.error(f"--comparisons: unknown {', '.join(sorted(unknown))}; there are pp, tp and dp")
    if arguments.dim % 32:
        parser.error("--dim: a multiple of 32, which two ranks can share evenly")
    return arguments


def _measure(arguments: argparse.Namespace, out: Path) -> int:
    """Runs both ranks, which leave a JSON line per comparison in ``out``; the exit code."""
    argv = ["-m", "benchmarks.parallel.worker", "--out", str(out)]
    for name in ("comparisons", "items", "layers", "dim", "rows", "microbatches", "rounds", "cuts"):
        argv += [f"--{name}", str(getattr(arguments, name))]
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    return launch(argv, nproc=2, env=env)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table; another code than 0 when a rank failed or somebody's losses were wrong."""
    arguments = _arguments(argv)
    tokens = 64 * arguments.rows
    print(
        f"{arguments.layers} layers of width {arguments.dim}; {arguments.microbatches} microbatches of {tokens} tokens"
        f"; medians of {arguments.rounds} interleaved rounds, all warm in the same processes",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="bench-parallel-") as folder:
        out = Path(folder) / "results.jsonl"
        code = _measure(arguments, out)
        if code:
            return code
        results = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    sizes = [result["last_bucket_nbytes"] for result in results if result["comparison"] == "dp"]
    floors = {n: ms for n, (ms, _) in native.floor_ms(2, sizes).items()} if sizes else {}
    body = [
        row for result in results for row in rows(result, floors.get(result.get("last_bucket_nbytes", 0)))
    ]
    print(table(_HEADER, body))
    if arguments.json is not None:
        settings = {**vars(arguments), "json": None}
        floor = {str(size): ms for size, ms in floors.items()}
        arguments.json.write_text(
            json.dumps({**settings, "floor_ms": floor, "results": results}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
