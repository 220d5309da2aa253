"""What a Reducer tells: counters, and the table of what was requested and what is active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridcomm import collective_plans as plans
from hybridcomm.bucket import BucketLayout
from hybridcomm.compress import Compressor
from hybridcomm.topology import Topology

__all__ = ["ReducerStats", "table"]


@dataclass(frozen=True, kw_only=True)
class ReducerStats:
    """Counts since construction, and of the last finalized step."""

    steps: int
    applied: int
    skipped: int
    exposed_seconds: float  # s in which the last finalize() was blocked
    total_exposed_seconds: float
    wire_nbytes: int  # bytes this rank sent between nodes in the last step
    total_wire_nbytes: int
    residual_nbytes: int


def table(
    topology: Topology,
    layouts: Sequence[BucketLayout],
    requested: str,
    compressor: Compressor | None,
    *,
    exchange: str = "auto",
) -> str:
    """Text: per link, requested -> active and dense bytes per byte sent; below it the buckets."""
    dense = compressed = in_two_stages = 0
    if exchange != "auto":
        requested += f", {exchange}"
    for layout in layouts:
        dense += plans.allreduce(topology, layout.numel, dtype=layout.dtype, op="mean").wire_nbytes()
        if compressor is not None:
            plan = plans.allreduce(
                topology, layout.numel, op="mean", compressor=compressor, exchange=exchange
            )
            compressed += plan.wire_nbytes(compressor.nbytes)
            in_two_stages += plan.exchange == "two_stage"
    multi = max(map(len, topology.nodes)) > 1
    rows = [("link", "requested", "active", "ratio")]
    rows.append(("intra_node", "dense", "dense" if multi else "no peer", "1.0" if multi else "-"))
    if len(topology.nodes) == 1:
        rows.append(("inter_node", requested, "no peer (one node)", "-"))
    elif compressor is None:
        rows.append(("inter_node", requested, "dense", "1.0"))
    else:
        active = str(compressor)
        if in_two_stages:
            active += f", {in_two_stages} of {len(layouts)} buckets in two stages"
        rows.append(("inter_node", requested, active, f"{dense / compressed:.1f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    mib = sum(layout.nbytes for layout in layouts) / (1 << 20)
    kinds = ", ".join(sorted({layout.dtype for layout in layouts}))
    sizes = " + ".join(str(len(node)) for node in topology.nodes)
    lines.append(f"{len(layouts)} buckets of {kinds}, {mib:.1f} MiB, over nodes of {sizes} ranks")
    return "\n".join(lines)
