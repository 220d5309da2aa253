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
    topology: Topology, layouts: Sequence[BucketLayout], requested: str, active: Sequence[Compressor | None]
) -> str:
    """Text: per link, and per kind of bucket, requested -> active and dense bytes per byte sent.

    ``active``: by bucket; None: dense.
    """
    dense, sent = zip(*(_wire(topology, *pair) for pair in zip(layouts, active, strict=True)), strict=True)
    multi, alone = max(map(len, topology.nodes)) > 1, len(topology.nodes) == 1
    names = dict.fromkeys(str(codec) for codec in active if codec is not None)
    some = " + dense" if names and None in active else ""
    across = "no peer (one node)" if alone else " + ".join(names) + some if names else "dense"
    links = [
        ("link", "requested", "active", "ratio"),
        ("intra_node", "dense", "dense" if multi else "no peer", "1.0" if multi else "-"),
        ("inter_node", requested, across, _ratio(sum(dense), sum(sent))),
    ]
    kinds: dict[tuple[str, str, str], list[int]] = {}
    for layout, codec in zip(layouts, active, strict=True):
        text = "dense" if codec is None or alone else str(codec)
        kinds.setdefault((layout.dtype, layout.compress, text), []).append(layout.index)
    rows = [("buckets", "dtype", "parameters", "MiB", "requested", "active", "ratio")]
    for (dtype, asked, acting), indices in kinds.items():
        count = sum(len(layouts[i].names) for i in indices)
        mib = sum(layouts[i].nbytes for i in indices) / (1 << 20)
        ratio = _ratio(sum(dense[i] for i in indices), sum(sent[i] for i in indices))
        rows.append((_ranges(indices), dtype, str(count), f"{mib:.2f}", asked, acting, ratio))
    mib = sum(layout.nbytes for layout in layouts) / (1 << 20)
    sizes = " + ".join(str(len(node)) for node in topology.nodes)
    total = f"{len(layouts)} buckets, {mib:.1f} MiB, over nodes of {sizes} ranks"
    return "\n".join([*_aligned(links), *_aligned(rows), total])


def _wire(topology: Topology, layout: BucketLayout, codec: Compressor | None) -> tuple[int, int]:
    """Bytes between nodes: dense in the bucket's dtype, and as they are sent."""
    dense = plans.allreduce(topology, layout.numel, dtype=layout.dtype, op="mean").wire_nbytes()
    if codec is None:
        return dense, dense
    plan = plans.allreduce(topology, layout.numel, op="mean", compressor=codec)
    return dense, plan.wire_nbytes(codec.nbytes)


def _ratio(dense: int, sent: int) -> str:
    return f"{dense / sent:.1f}" if sent else "-"


def _ranges(indices: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> "0-2,5"."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and parts[-1][-1] == index - 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in padded]
