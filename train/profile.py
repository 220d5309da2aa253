"""Steps of all ranks on one clock: a table of where they went, a Perfetto trace and a picture of the last one.

1. offsets   rank 0 plays ping-pong with each other rank; the round that took least says how far the clocks are apart,
             to half of the time that it took
2. gather    every rank's slices come to rank 0, in s of its clock
3. tell      the table (`train.breakdown`); a trace in Chrome's JSON format; the same slices drawn
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hybridcomm.groups import Grouping
from train.pipeline.trace import TRACKS, Slice

__all__ = ["RankTrace", "chrome_trace", "clock_offset", "draw", "gather", "write"]

_ROUNDS = 20
_TAG = 7


@dataclass(frozen=True, kw_only=True)
class RankTrace:
    """``steps`` of one rank, in s of rank 0's clock; its own is ``offset`` s ahead of that, give or take ``error``.

    ``pipeline``: the ranks of its pipeline.
    """

    rank: int
    steps: tuple[tuple[Slice, ...], ...]
    offset: float = 0.0
    error: float = 0.0
    pipeline: tuple[int, ...] = ()


def clock_offset(ctx: Grouping, clock: Callable[[], float] = time.perf_counter) -> list[tuple[float, float]]:
    """By rank (offset, error) in s on rank 0, elsewhere an empty list; all ranks call it.

    The other's time lies between two of ours: their middle is off by at most half of what is between them.
    """
    now = np.zeros(1)
    if ctx.rank > 0:
        for _ in range(_ROUNDS):
            ctx.recv(now, 0, _TAG)
            now[0] = clock()
            ctx.send(now, 0, _TAG)
        return []
    found = [(0.0, 0.0)]
    for rank in range(1, ctx.world_size):
        rounds = []
        for _ in range(_ROUNDS):
            begin = clock()
            ctx.send(now, rank, _TAG)
            ctx.recv(now, rank, _TAG)
            end = clock()
            rounds.append(((end - begin) / 2, float(now[0]) - (begin + end) / 2))
        error, offset = min(rounds)
        found.append((offset, error))
    return found


def gather(
    ctx: Grouping,
    steps: Sequence[Sequence[Slice]],
    pipelines: Sequence[tuple[int, ...]],
    clock: Callable[[], float] = time.perf_counter,
) -> list[RankTrace]:
    """All ranks' steps on rank 0, aligned; elsewhere an empty list. All ranks call it.

    ``pipelines``: by rank, the ranks of its pipeline.
    """
    offsets = clock_offset(ctx, clock)
    text = json.dumps([list(map(list, step)) for step in steps]).encode()
    mine = np.frombuffer(text, dtype=np.uint8).copy()
    if ctx.rank > 0:
        ctx.send(np.array([len(mine)]), 0, _TAG)
        ctx.send(mine, 0, _TAG)
        return []
    out = []
    for rank, (offset, error) in enumerate(offsets):
        found = mine
        if rank > 0:
            size = np.zeros(1, dtype=np.int64)
            ctx.recv(size, rank, _TAG)
            found = np.empty(int(size[0]), dtype=np.uint8)
            ctx.recv(found, rank, _TAG)
        read = json.loads(found.tobytes())
        aligned = tuple(
            tuple(Slice(track, name, begin - offset, end - offset) for track, name, begin, end in step)
            for step in read
        )
        out.append(RankTrace(rank=rank, steps=aligned, offset=offset, error=error, pipeline=pipelines[rank]))
    return out


def last_step(traces: Sequence[RankTrace]) -> list[RankTrace]:
    """The latest step alone, in s from its first slice."""
    begin = min(each.begin for trace in traces for each in trace.steps[-1])
    return [
        replace(
            trace,
            steps=(tuple(s._replace(begin=s.begin - begin, end=s.end - begin) for s in trace.steps[-1]),),
        )
        for trace in traces
    ]


def chrome_trace(traces: Sequence[RankTrace], facts: dict[str, Any]) -> dict[str, Any]:
    """The latest step in the format that Perfetto and chrome://tracing read: ranks as processes, tracks as threads.

    ``otherData`` has ``facts``, and each rank's clock offset with its error, in s.
    """
    events: list[dict[str, Any]] = []
    for trace in last_step(traces):
        events.append(_name("process_name", trace.rank, 0, f"rank {trace.rank}"))
        for number, track in enumerate(TRACKS):
            events.append(_name("thread_name", trace.rank, number, track))
        for each in trace.steps[0]:
            events.append(
                {
                    "ph": "X",
                    "name": each.name,
                    "cat": each.track,
                    "pid": trace.rank,
                    "tid": TRACKS.index(each.track),
                    "ts": 1e6 * each.begin,
                    "dur": 1e6 * (each.end - each.begin),
                }
            )
    clocks = {
        str(trace.rank): {"clock_offset_s": trace.offset, "clock_error_s": trace.error} for trace in traces
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {**facts, "ranks": clocks}}


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


_COLOURS = {
    "F": "#4c78a8", "B": "#72b7b2", "I": "#72b7b2", "W": "#54a24b", "H": "#b279a2", "o": "#9d755d",
    "waits": "#e45756", "layers": "#f58518", "buckets": "#eeca3b",
}  # fmt: skip
_LABELS = {
    "F": "forward", "I": "backward (B, I)", "W": "weight gradients (W)", "H": "head", "o": "optimizer",
    "waits": "exposed waits", "layers": "layers' collectives", "buckets": "bucket all-reduces",
}  # fmt: skip


def draw(traces: Sequence[RankTrace], title: str, paths: Sequence[Path]) -> None:
    """The latest step as a picture, a row of tracks per rank, into each of ``paths`` (.png, .svg)."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = last_step(traces)
    figure = Figure(figsize=(12, 1.2 + 0.8 * len(ranks)), layout="constrained")
    axes = figure.add_subplot()
    for row, trace in enumerate(ranks):
        for each in trace.steps[0]:
            key = each.track if each.track != "instructions" else each.name[0]
            if key not in _COLOURS:  # sends and receives are posted, which takes no time that could be seen
                continue
            low, height = {"instructions": (0.3, 0.5), "waits": (0.3, 0.5)}.get(each.track, (0.1, 0.15))
            low = 0.8 if each.track == "layers" else low
            axes.broken_barh(
                [(1e3 * each.begin, 1e3 * (each.end - each.begin))],
                (len(ranks) - 1 - row + low, height),
                color=_COLOURS[key], alpha=0.35 if each.track == "waits" else 1.0, linewidth=0,
            )  # fmt: skip
    axes.set_yticks([len(ranks) - 0.5 - row for row in range(len(ranks))])
    axes.set_yticklabels([f"rank {trace.rank}" for trace in ranks])
    axes.set_xlabel("ms of the step, on rank 0's clock")
    axes.set_title(title, loc="left")
    handles = [
        Patch(color=_COLOURS[key], label=label, alpha=0.35 if key == "waits" else 1.0)
        for key, label in _LABELS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    for path in paths:
        figure.savefig(path, dpi=150)


def write(traces: Sequence[RankTrace], run_dir: Path, title: str, facts: dict[str, Any]) -> list[Path]:
    """``profile.json``, ``timeline.png`` and ``timeline.svg`` in ``run_dir``; what was written."""
    trace = run_dir / "profile.json"
    trace.write_text(json.dumps(chrome_trace(traces, facts)) + "\n", encoding="utf-8")
    pictures = [run_dir / "timeline.png", run_dir / "timeline.svg"]
    draw(traces, title, pictures)
    return [trace, *pictures]
