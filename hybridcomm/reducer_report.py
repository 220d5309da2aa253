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
    requested: str,
    links: Sequence[LinkCompressors | None],
    exchanges: Sequence[str],
) -> str:
    """Text: per link, and per kind of bucket, requested -> active and dense bytes per byte sent.

    ``links``: what acts, by bucket; None: dense. ``exchanges``: as asked for, by bucket.
    """
    active = [None if link is None else resolve(link.inter_node) for link in links]
    dense, sent, ways = zip(
        *(_wire(topology, *row) for row in zip(layouts, links, exchanges, strict=True)), strict=True
    )
    alone = len(topology.nodes) == 1
    names = dict.fromkeys(str(codec) for codec in active if codec is not None)
    some = " + dense" if names and None in active else ""
    across = "no peer (one node)" if alone else " + ".join(names) + some if names else "dense"
    if "two_stage" in ways:
        across += f", {ways.count('two_stage')} of {len(ways)} buckets in two stages"
    asked_ways = ", ".join([requested, *sorted(set(exchanges) & {"gather", "two_stage"})])
    by_link = [
        ("link", "requested", "active", "ratio"),
        ("intra_node", *_in_node(topology, layouts, links)),
        ("inter_node", asked_ways, across, _ratio(sum(dense), sum(sent))),
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
    return "\n".join([*_aligned(by_link), *_aligned(rows), total])


def _wire(
    topology: Topology, layout: BucketLayout, links: LinkCompressors | None, exchange: str
) -> tuple[int, int, str]:
    """Bytes between nodes, dense in the bucket's dtype and as they are sent; how payloads are exchanged."""
    dense = plans.allreduce(topology, layout.numel, dtype=layout.dtype, op="mean").wire_nbytes()
    codec = None if links is None else resolve(links.inter_node)
    if links is None or codec is None:
        return dense, dense, "none"
    plan = plans.allreduce(
        topology,
        layout.numel,
        op="mean",
        compressor=codec,
        intra=links.intra_node,
        exchange=exchange,
    )
    return dense, plan.wire_nbytes(codec.nbytes), plan.exchange


def _in_node(
    topology: Topology, layouts: Sequence[BucketLayout], links: Sequence[LinkCompressors | None]
) -> tuple[str, str, str]:
    """Requested, active, ratio; bytes are those that go to owners, and back, which is dense."""
    codec = next((link.intra_node for link in links if link is not None), None)
    asked = "dense" if codec is None else str(codec)
    if topology.K == 1:
        return asked, "no peer", "-"
    if codec is None:
        return asked, "dense", "1.0"
    dense = sum(layout.nbytes for layout in layouts)
    sent = sum(
        layout.nbytes if link is None else codec.nbytes(layout.numel)
        for layout, link in zip(layouts, links, strict=True)
    )
    return asked, f"{codec} to owners, dense back", _ratio(2 * dense, dense + sent)


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
