"""Prints one table of peers, ours, ratio and limit after the in-host benchmarks."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.table import table

_OURS = ("engine", "hybridcomm", "hybridcomm.empty")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """ms per call by ranks and size."""
    session = getattr(config, "_benchmarksession", None)
    cases: dict[tuple[int, int], dict[str, float]] = {}
    floors: dict[tuple[int, int], tuple[float, float]] = {}
    for case in session.benchmarks if session is not None else []:
        info = case.extra_info
        if "ms_per_call" in info:
            cases.setdefault((info["ranks"], info["nbytes"]), {})[info["peer"]] = info["ms_per_call"]
        for nbytes, ms in info.get("floor_ms", {}).items():
            floors[info["ranks"], int(nbytes)] = ms
    if not cases:
        return
    found = {peer for by_peer in cases.values() for peer in by_peer}
    peers = sorted(found - set(_OURS))
    columns = [*peers, *(name for name in _OURS if name in found)]
    rows = []
    for where, by_peer in sorted(cases.items()):
        ours, limits = by_peer.get("hybridcomm"), floors.get(where, (None, None))
        best = min((by_peer[peer] for peer in peers if peer in by_peer), default=None)
        cells = [f"{by_peer[name]:.4f}" if name in by_peer else "" for name in columns]
        cells.append(f"{best / ours:.2f}" if best and ours else "")
        for limit in limits:
            cells.append(f"{limit:.4f}" if limit else "")
            for name in ("hybridcomm", "hybridcomm.empty"):
                cells.append(f"{by_peer[name] / limit:.1f}" if limit and name in by_peer else "")
        rows.append([f"{where[0]} ranks {where[1] >> 10} KiB", *cells])
    header = ["fp32 sum", *columns, "best peer / ours"]
    for limit in ("limit", "rewritten limit"):
        header += [limit, f"ours / {limit}", f"empty / {limit}"]
    terminalreporter.section("in-host all-reduce, ms per call (median)")
    terminalreporter.write_line(table(header, rows))
