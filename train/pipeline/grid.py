"""Schedules for the eye: rows of ranks, with steps marked."""

from __future__ import annotations

from collections.abc import Mapping

from train.pipeline.instructions import PipelineSchedule

__all__ = ["list_grid"]

_AROUND = 6
"""Entries shown on either side of a marked one."""


def list_grid(schedule: PipelineSchedule, marks: Mapping[int, int]) -> str:
    """One row per rank, in the order of its list; where the lists do not run, there is no time to draw.

    ``marks``: rank -> place in its list, shown as ``>>F0.3<<`` with what stands around it (a place behind the end
    as ``>>end<<``). Ranks without a mark show their beginning.
    """
    rows = []
    for rank, entries in enumerate(schedule.lists):
        texts = [*map(str, entries), "end"]
        mark = marks.get(rank)
        if mark is not None:
            texts[mark] = f">>{texts[mark]}<<"
        begin = max(0, (mark or 0) - _AROUND)
        end = min(len(texts), begin + 2 * _AROUND + 1)
        left, right = "... " if begin else "", " ..." if end < len(texts) else ""
        rows.append(f"rank {rank:2d} | {left}{' '.join(texts[begin:end])}{right}")
    return "\n".join(rows)
