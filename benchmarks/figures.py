"""Draws figures from the benchmarks' JSON files: ``python -m benchmarks.figures --allreduce FILE ...``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_OURS, _PEER, _INK = "#0b6e99", "#b8bec6", "#333333"


def _bars(axes: Axes, names: list[str], values: list[float], ours: list[bool], unit: str) -> None:
    axes.barh(names, values, color=[_OURS if own else _PEER for own in ours], height=0.66)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.15)
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    for row, value in enumerate(values):
        text = f"{value:,.0f}" if value >= 20 else f"{value:,.2g}"
        axes.text(value, row, f" {text}", va="center", color=_INK, fontsize=9)


def _rate(result: dict[str, Any]) -> str:
    return f"{result['rate'] / 1e6:g} Mbit/s" if result["rate"] else "unshaped"


def allreduce_figure(result: dict[str, Any]) -> Figure:
    """One all-reduce: ms of each peer and ours, with the wire limit of dense traffic."""
    lines = [line for line in result["lines"] if line["key"] != "local"]
    figure, axes = plt.subplots(figsize=(7, 0.42 * len(lines) + 1.2), layout="constrained")
    names = [line["name"] for line in lines]
    medians = [line["ms"]["median"] for line in lines]
    _bars(axes, names, medians, [line["key"].startswith("ours") for line in lines], "ms (median)")
    if result.get("limit_ms"):
        axes.axvline(result["limit_ms"], color=_INK, linewidth=1, linestyle=":")
        axes.set_title(f"dotted: what {_rate(result)} allows a dense all-reduce", fontsize=9, loc="right")
    ranks = "+".join(map(str, result["ranks_of"]))
    figure.suptitle(f"All-reduce of {result['numel'] * 4 / 2**20:g} MiB fp32, ranks {ranks}, {_rate(result)}")
    return figure


def training_figure(report: dict[str, Any]) -> Figure:
    """Step time and exposed communication of each way to train."""
    lines = report["lines"]
    size = (8, 0.45 * len(lines) + 1.2)
    figure, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    names, ours = [line["name"] for line in lines], [not line["key"].startswith("ddp") for line in lines]
    _bars(left, names, [line["step_ms"] for line in lines], ours, "step, ms")
    right_values = [line["exposed_ms"] for line in lines]
    _bars(right, names, right_values, ours, "exposed communication, ms")
    left.invert_yaxis()  # shared with the right side, which has turned it back
    figure.suptitle(f"Training at {report['rate']} between nodes")
    return figure


def quality_figure(summary: dict[str, Any]) -> Figure:
    """NDCG@10 of each pair of runs, dense against compressed."""
    dense, topk = summary["ndcg"]["dense"], summary["ndcg"]["topk"]
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for pair in zip(dense, topk, strict=True):
        axes.plot([0, 1], pair, color=_PEER, marker="o", markerfacecolor=_OURS, markeredgecolor=_OURS)
    popularity = summary["popularity_ndcg"]
    axes.axhline(popularity, color=_INK, linewidth=1, linestyle=":")
    axes.text(0.5, popularity, "popularity", va="bottom", ha="center", fontsize=9)
    axes.set_xticks([0, 1], ["dense", "top-k 1 %"])
    axes.set_xlim(-0.3, 1.3)
    axes.set_ylim(0, max(*dense, *topk) * 1.15)
    axes.set_ylabel("NDCG@10, full ranking")
    axes.spines[["top", "right"]].set_visible(False)
    low = 100 * summary["ndcg"]["relative_low"]
    figure.suptitle(f"{summary['seeds']} paired seeds, {summary['wire_ratio']:.0f}x fewer bytes\n"
                    f"95 % lower bound of the difference: {low:+.1f} %", fontsize=10)  # fmt: skip
    return figure


def main() -> int:
    """Draw what there are files for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--allreduce", type=Path, help="JSON of bench_allreduce; its first result is drawn")
    parser.add_argument("--training", type=Path, help="JSON of bench_training")
    parser.add_argument("--quality", type=Path, help="summary.json of studies.quality")
    parser.add_argument("--out", type=Path, default=Path("docs/img"), help="directory (default docs/img)")
    arguments = parser.parse_args()
    figures: dict[str, Figure] = {}
    if arguments.allreduce is not None:
        figures["allreduce"] = allreduce_figure(json.loads(arguments.allreduce.read_text())[0])
    if arguments.training is not None:
        figures["training"] = training_figure(json.loads(arguments.training.read_text()))
    if arguments.quality is not None:
        figures["quality"] = quality_figure(json.loads(arguments.quality.read_text()))
    if not figures:
        parser.error("nothing to draw: give --allreduce, --training or --quality")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = arguments.out / f"{name}.png"
        figure.savefig(path, dpi=110)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
