"""Where a step's time went, rank by rank: computation by kind, bubble, and communication that computation waited for.

A wait for a message is a *bubble* until the sender has begun to send it, and exposed PP communication from then on. So
a table needs all ranks' slices on one clock (`train.profile`).
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from train.pipeline.instructions import Instruction
from train.pipeline.trace import Slice
from train.profile import RankTrace

__all__ = ["COLUMNS", "breakdown", "breakdown_table"]

COLUMNS = (
    "forward", "backward", "input_grad", "weight_grad", "head", "bubble", "exposed_tp", "exposed_pp", "exposed_dp",
    "optimizer", "other", "total",
)  # fmt: skip
_SHORT = {
    "forward": "F", "backward": "B", "input_grad": "I", "weight_grad": "W", "exposed_tp": "TP", "exposed_pp": "PP",
    "exposed_dp": "DP", "optimizer": "opt",
}  # fmt: skip
_KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "input_grad",
    "W": "weight_grad",
    "HEAD_S": "head",
    "HEAD_T": "head",
    "optimizer": "optimizer",
}


def breakdown(traces: Sequence[RankTrace], step: int = -1) -> list[dict[str, float]]:
    """By rank, s of a step by `COLUMNS`; all but ``total`` add up to it, from the step's first slice to its last."""
    slices = [trace.steps[step] for trace in traces]
    sent = _sent(slices)
    return [_of_rank(own, sent, _peers(traces, number)) for number, own in enumerate(slices)]


def _of_rank(
    own: Sequence[Slice], sent: dict[tuple[str, int], float], peers: frozenset[int]
) -> dict[str, float]:
    row = dict.fromkeys(COLUMNS, 0.0)
    layers = [each for each in own if each.track == "layers"]
    for each in own:
        took = each.end - each.begin
        shared = sum(inner.end - inner.begin for inner in layers if each.begin <= inner.begin < each.end)
        if each.track == "instructions":
            kind = _KINDS.get(each.name if each.name == "optimizer" else Instruction.parse(each.name).op)
            if kind is not None:
                row[kind] += took - shared
        elif each.track == "layers":
            row["exposed_tp"] += took
        elif each.track == "waits" and each.name == "buckets":
            row["exposed_dp"] += took
        elif each.track == "waits" and each.name == "copies":
            row["exposed_pp"] += took - shared
        elif each.track == "waits":
            begun = max((sent.get((each.name, peer), each.begin) for peer in peers), default=each.begin)
            bubble = min(max(begun - each.begin, 0.0), took)
            row["bubble"] += bubble
            row["exposed_pp"] += took - bubble
    row["total"] = max(each.end for each in own) - min(each.begin for each in own)
    row["other"] = row["total"] - sum(row[name] for name in COLUMNS[:-2])
    return row


def _sent(slices: Sequence[Sequence[Slice]]) -> dict[tuple[str, int], float]:
    """(what a wait is called, the rank that made it) -> when that began to send it."""
    out: dict[tuple[str, int], float] = {}
    for rank, own in enumerate(slices):
        for each in own:
            if each.track == "instructions" and each.name.startswith(("SEND", "HEAD_X", "HEAD_C")):
                entry = Instruction.parse(each.name)
                name = each.name
                if entry.op == "SEND_F":
                    name = f"RECV_F{entry.stage + 1}.{entry.microbatch}"
                elif entry.op == "SEND_I":
                    name = f"RECV_I{entry.stage - 1}.{entry.microbatch}"
                out[name, rank] = each.begin
    return out


def _peers(traces: Sequence[RankTrace], number: int) -> frozenset[int]:
    return frozenset(traces[number].pipeline) if traces[number].pipeline else frozenset(range(len(traces)))


def breakdown_table(traces: Sequence[RankTrace], kind: str = "") -> tuple[Table, list[dict[str, float]]]:
    """A row per rank and of their mean, in ms and parts of the step, over the traced steps; and those rows in s."""
    steps = len(traces[0].steps)
    every = [breakdown(traces, step) for step in range(steps)]
    rows = [
        {name: sum(step[number][name] for step in every) / steps for name in COLUMNS}
        for number in range(len(traces))
    ]
    shown = [name for name in COLUMNS if name == "total" or any(row[name] for row in rows)]
    table = Table(
        title=f"{kind}where a step went, ms (means of the last {steps} steps)", title_justify="left"
    )
    table.add_column("rank", no_wrap=True)
    for name in shown:
        table.add_column(_SHORT.get(name, name), justify="right", no_wrap=True)
    for trace, row in zip(traces, rows, strict=True):
        table.add_row(str(trace.rank), *(f"{1e3 * row[name]:.1f}" for name in shown))
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in COLUMNS}
    table.add_row("mean", *(f"{1e3 * mean[name]:.1f}" for name in shown))
    table.add_row("of it", *(f"{100 * mean[name] / (mean['total'] or 1):.0f} %" for name in shown))
    table.caption = (
        "F forward, B backward (I of the input, W of weights), TP, PP, DP: communication that was waited for"
    )
    return table, rows
