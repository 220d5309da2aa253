"""What a Reducer tells: counters, and the table of what was requested and what is active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridcomm import collective_plans as plans
from hybridcomm.bucket import BucketLayout
from hybridcomm.compress import LinkCompressors, resolve
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
    requested: LinkCompressors,
    active: LinkCompressors,
    *,
    exchange: str = "auto",
) -> str:
    """Text: per link, requested -> active and dense bytes per byte sent; below it the buckets."""
    rows = [("link", "requested", "active", "ratio")]
    rows.append(("intra_node", *_intra_node(topology, layouts, requested, active)))
    rows.append(("inter_node", *_inter_node(topology, layouts, requested, active, exchange)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    mib = sum(layout.nbytes for layout in layouts) / (1 << 20)
    kinds = ", ".join(sorted({layout.dtype for layout in layouts}))
    sizes = " + ".join(str(len(node)) for node in topology.nodes)
    lines.append(f"{len(layouts)} buckets of {kinds}, {mib:.1f} MiB, over nodes of {sizes} ranks")
    return "\n".join(lines)


def _intra_node(
    topology: Topology, layouts: Sequence[BucketLayout], requested: LinkCompressors, active: LinkCompressors
) -> tuple[str, str, str]:
    """Bytes are those that go to owners and back; back they are dense."""
    codec = active.intra_node
    asked = "dense" if requested.intra_node is None else str(requested.intra_node)
    if topology.K == 1:
        return asked, "no peer", "-"
    if codec is None:
        return asked, "dense", "1.0"
    dense = sum(layout.nbytes for layout in layouts)
    sent = sum(codec.nbytes(layout.numel) for layout in layouts)
    return asked, f"{codec} to owners, dense back", f"{2 * dense / (dense + sent):.1f}"


def _inter_node(
    topology: Topology,
    layouts: Sequence[BucketLayout],
    requested: LinkCompressors,
    active: LinkCompressors,
    exchange: str,
) -> tuple[str, str, str]:
    asked = "none" if requested.inter_node is None else str(requested.inter_node)
    asked += "" if exchange == "auto" else f", {exchange}"
    codec = resolve(active.inter_node)
    if len(topology.nodes) == 1:
        return asked, "no peer (one node)", "-"
    if codec is None:
        return asked, "dense", "1.0"
    dense = compressed = in_two_stages = 0
    for layout in layouts:
        dense += plans.allreduce(topology, layout.numel, dtype=layout.dtype, op="mean").wire_nbytes()
        plan = plans.allreduce(
            topology, layout.numel, op="mean", compressor=codec, intra=active.intra_node, exchange=exchange
        )
        compressed += plan.wire_nbytes(codec.nbytes)
        in_two_stages += plan.exchange == "two_stage"
    what = (
        f"{codec}, {in_two_stages} of {len(layouts)} buckets in two stages" if in_two_stages else str(codec)
    )
    return asked, what, f"{dense / compressed:.1f}"
