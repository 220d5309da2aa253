"""Prints rows in nccl-tests' columns, and writes them as JSON or as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybridcomm.bench.measure import Row
from hybridcomm.errors import UnsupportedError

__all__ = ["check_plot", "footer", "header", "line", "write_json", "write_plot"]

_LEFT = "{:>12} {:>12} {:>9} {:>7}"
_DENSE = _LEFT + " {:>10} {:>8} {:>8} {:>7}"
_LOSSY = _LEFT + " {:>10} {:>12} {:>7} {:>8} {:>9}"


def header(*, compressed: bool) -> str:
    """nccl-tests' two header lines; a compressed run has other columns right of ``time``."""
    names: tuple[str, ...]
    if compressed:
        names = ("size", "count", "type", "redop", "time", "wirebytes", "ratio", "effbw", "err")
        units: tuple[str, ...] = ("(B)", "(elements)", "", "", "(us)", "(B)", "", "(GB/s)", "")
        return _two_lines(_LOSSY, names, units)
    names = ("size", "count", "type", "redop", "time", "algbw", "busbw", "#wrong")
    units = ("(B)", "(elements)", "", "", "(us)", "(GB/s)", "(GB/s)", "")
    return _two_lines(_DENSE, names, units)


def _two_lines(form: str, *lines: Sequence[str]) -> str:
    return "\n".join("#" + form.format(*cells)[1:].rstrip() for cells in lines)


def line(row: Row) -> str:
    """One row: time in us, bandwidths in 10^9 bytes/s."""
    left = (row.nbytes, row.count, row.dtype, row.op, f"{row.seconds * 1e6:.2f}")
    if row.busbw is None:
        return _LOSSY.format(
            *left,
            row.wire_nbytes,
            f"{row.dense_nbytes / row.wire_nbytes:.1f}" if row.wire_nbytes else "-",
            f"{row.algbw / 1e9:.3f}",
            "N/A" if row.err is None else f"{row.err:.2e}",
        )
    wrong = "N/A" if row.wrong is None else row.wrong
    return _DENSE.format(*left, f"{row.algbw / 1e9:.3f}", f"{row.busbw / 1e9:.3f}", wrong)


def footer(rows: Sequence[Row]) -> str:
    """Whether all results were right, and the mean bus bandwidth of dense runs; a lossy run has neither."""
    wrong = sum(row.wrong or 0 for row in rows)
    checked = [row for row in rows if row.wrong is not None]
    lines = [f"# Wrong elements: {wrong} {'OK' if not wrong else 'FAILED'}"] if checked else []
    busbw = [row.busbw for row in rows if row.busbw is not None]
    if busbw:
        lines.append(f"# Avg bus bandwidth: {sum(busbw) / len(busbw) / 1e9:g} GB/s")
    return "\n".join(lines)


def write_json(path: Path, rows: Sequence[Row], **about: Any) -> None:
    """``about`` and the rows, times in s, sizes in bytes, bandwidths in bytes/s."""
    path.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def check_plot() -> None:
    """Raises `UnsupportedError` where --plot could not be drawn; called before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnsupportedError("--plot needs matplotlib: pip install matplotlib") from error


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Time and bandwidth (busbw, or effbw of a compressed run) over size, one line per collective."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row.collective for row in rows):
        own = [row for row in rows if row.collective == name and not math.isnan(row.seconds)]
        sizes = [row.nbytes for row in own]
        left.plot(sizes, [row.seconds * 1e6 for row in own], marker="o", label=name)
        speeds = [(row.algbw if row.busbw is None else row.busbw) / 1e9 for row in own]
        right.plot(sizes, speeds, marker="o", label=name)
    lossy = any(row.busbw is None for row in rows)
    for axes, what in ((left, "time, us"), (right, "effbw, GB/s" if lossy else "busbw, GB/s")):
        axes.set(xscale="log", yscale="log", xlabel="size, bytes", ylabel=what)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)
