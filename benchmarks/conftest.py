"""Prints one table of peers and ours after the in-host benchmarks."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.table import table


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """ms per call by ranks and size: gloo, ours, ratio."""
    session = getattr(config, "_benchmarksession", None)
    cases: dict[tuple[int, int], dict[str, float]] = {}
    for case in session.benchmarks if session is not None else []:
        info = case.extra_info
        if "ms_per_call" in info:
            cases.setdefault((info["ranks"], info["nbytes"]), {})[info["peer"]] = info["ms_per_call"]
    rows = [
        [f"{ranks} ranks {nbytes >> 10} KiB", f"{gloo:.4f}", f"{ours:.4f}", f"{gloo / ours:.1f}"]
        for (ranks, nbytes), by_peer in sorted(cases.items())
        if (gloo := by_peer.get("gloo")) and (ours := by_peer.get("hybridcomm"))
    ]
    if rows:
        terminalreporter.section("in-host all-reduce, ms per call (median)")
        terminalreporter.write_line(table(["fp32 sum", "gloo", "hybridcomm", "ratio"], rows))
