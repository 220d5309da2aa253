"""Traces of a real step: every instruction once, nothing overlaps on a track, clocks that differ are aligned."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hybridcomm.context import Context
from hybridcomm.reducer import Reducer
from hybridcomm.topology import Topology
from model.parts import split
from tests.engine_ranks import engine_contexts
from tests.ranks import run_ranks
from tests.train.replicas import ThreadReplica, microbatches, spec
from train.breakdown import COLUMNS, breakdown, breakdown_table
from train.mesh import Mesh
from train.pipeline import Instruction, PipelineSchedule, lower, make_schedule
from train.pipeline.instructions import SEND
from train.pipeline.trace import TRACKS, Slice
from train.profile import RankTrace, chrome_trace, gather, write

SKEW_S = 100.0
STEPS = 2


def traced(
    name: str, pp: int, tp: int, *, head: bool = False, skew: float = SKEW_S
) -> tuple[list[RankTrace], Any]:
    """Two steps on twice as many ranks, each with a clock of its own; and each rank's list."""
    topology = Topology.virtual(2 * pp, tp)

    def body(ctx: Context) -> tuple[list[RankTrace], PipelineSchedule, int]:
        mesh = Mesh.over(ctx.topology, pp=pp, tp=tp)
        node = ctx.connect_node() if tp > 1 else None
        lowered = lower(make_schedule(name, pp, 3), head=head)
        replica = ThreadReplica(
            spec(), split(4, lowered.stages), lowered, mesh=mesh, ctx=ctx, node=node,
            make_reducer=lambda module, group: Reducer(module, ctx=group, sync_parameters=False),
        )  # fmt: skip
        for step in range(STEPS):
            replica.module.zero_grad()
            replica.step(microbatches(step, replica.place.dp, mesh.dp, 3))
            for reducer in replica.runtime.all_reducers():
                reducer.commit()
        ahead = skew * ctx.rank
        steps = [
            [each._replace(begin=each.begin + ahead, end=each.end + ahead) for each in step]
            for step in replica.recorder.steps
        ]
        pipelines = [mesh.along("pp", rank) for rank in range(ctx.world_size)]
        found = gather(ctx, steps, pipelines, lambda: time.perf_counter() + ahead)
        if node is not None:
            node.close()
        return found, replica.schedule, mesh.at(ctx.rank).pp

    with engine_contexts(topology) as contexts:
        results = run_ranks(body, contexts)
    assert not any(found for found, *_ in results[1:])
    return results[0][0], [schedule.lists[place] for _, schedule, place in results]


def overlapping(slices: Sequence[Slice]) -> list[tuple[Slice, Slice]]:
    """Neighbours on a track of which the second begins before the first has ended."""
    return [
        pair
        for track in TRACKS
        for pair in pairwise(sorted((s for s in slices if s.track == track), key=lambda s: (s.begin, s.end)))
        if pair[1].begin < pair[0].end
    ]


def too_early(traces: Sequence[RankTrace]) -> list[str]:
    """Messages that had come before their sender began to send them, by more than the clocks may be off."""
    out = []
    for trace in traces:
        for sent in (s for s in trace.steps[-1] if s.track == "instructions" and s.name.startswith(SEND)):
            entry = Instruction.parse(sent.name)
            step = 1 if entry.op == "SEND_F" else -1
            name = f"{entry.op.replace('SEND', 'RECV')}{entry.stage + step}.{entry.microbatch}"
            other = traces[trace.pipeline[entry.peer]]
            (came,) = [s for s in other.steps[-1] if (s.track, s.name) == ("waits", name)]
            if came.end < sent.begin - trace.error - other.error:
                out.append(sent.name)
    return out


@pytest.mark.parametrize(
    ("name", "pp", "tp", "head"), [("1f1b", 2, 1, False), ("zbv", 2, 2, False), ("1f1b+1", 2, 2, True)]
)
def test_a_trace_of_a_step(name: str, pp: int, tp: int, head: bool, tmp_path: Path) -> None:
    traces, lists = traced(name, pp, tp, head=head)
    assert [len(trace.steps) for trace in traces] == [STEPS] * len(traces)
    for trace, entries in zip(traces, lists, strict=True):
        for step in trace.steps:
            assert [s.name for s in step if s.track == "instructions"] == list(map(str, entries))
            assert not overlapping(step)
            assert {s.track for s in step} == set(TRACKS) - (set() if tp > 1 else {"layers"})
            buckets = {s.name for s in step if s.track == "buckets"}
            assert len(buckets) == sum(entry.op == "REDUCE" for entry in entries)
    assert not too_early(traces)
    assert all(abs(trace.offset - SKEW_S * trace.rank) <= trace.error for trace in traces)
    for number in range(STEPS):
        for row in breakdown(traces, number):
            assert sum(row[column] for column in COLUMNS[:-1]) == pytest.approx(row["total"])
            assert min(row[column] for column in COLUMNS if column != "other") >= 0
            assert (row["exposed_tp"] > 0) == (tp > 1)
            assert (row["head"] > 0) == head
    paths = write(traces, tmp_path, "a step", {"schedule": name})
    assert [path.name for path in paths] == ["profile.json", "timeline.png", "timeline.svg"]
    assert paths[1].read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in paths[2].read_bytes()
    check_chrome(json.loads(paths[0].read_text()), traces)


def check_chrome(trace: dict[str, Any], traces: Sequence[RankTrace]) -> None:
    """What the trace format asks for: named processes and threads, complete events with times in microseconds."""
    events = trace["traceEvents"]
    named = {(e["pid"], e["tid"]) for e in events if (e["ph"], e["name"]) == ("M", "thread_name")}
    complete = [e for e in events if e["ph"] == "X"]
    assert {e["ph"] for e in events} == {"M", "X"}
    assert {(e["pid"], e["tid"]) for e in complete} <= named
    assert len(complete) == sum(len(each.steps[-1]) for each in traces)
    assert min(e["ts"] for e in complete) == 0
    assert all(e["dur"] >= 0 for e in complete)
    assert set(trace["otherData"]["ranks"]) == {str(each.rank) for each in traces}
    assert all(facts["clock_error_s"] >= 0 for facts in trace["otherData"]["ranks"].values())


def test_control_clocks_that_are_not_aligned_are_noticed() -> None:
    traces, _ = traced("1f1b", 2, 1)
    ahead = [
        RankTrace(
            rank=trace.rank, error=trace.error, pipeline=trace.pipeline,
            steps=tuple(
                tuple(s._replace(begin=s.begin + trace.offset, end=s.end + trace.offset) for s in step)
                for step in trace.steps
            ),
        )
        for trace in traces
    ]  # fmt: skip
    assert too_early(ahead)


def test_control_an_overlap_is_noticed() -> None:
    slices = [Slice("waits", "a", 0.0, 1.0), Slice("buckets", "b", 0.5, 2.0), Slice("waits", "c", 0.75, 2.0)]
    assert overlapping(slices) == [(slices[0], slices[2])]
    assert not overlapping(slices[:2])


def rank(number: int, *slices: tuple[str, str, float, float]) -> RankTrace:
    return RankTrace(rank=number, steps=(tuple(Slice(*each) for each in slices),), pipeline=(0, 1))


def test_a_wait_is_a_bubble_until_its_message_is_sent() -> None:
    """Rank 1 waits from 0 to 5 for what rank 0 sends at 3; its layers wait 1 s inside F."""
    traces = [
        rank(0, ("instructions", "F0.0", 0.0, 3.0), ("instructions", "SEND_F0.0>1", 3.0, 3.5)),
        rank(
            1,
            ("instructions", "RECV_F1.0<0", 0.0, 0.0),
            ("waits", "RECV_F1.0", 0.0, 5.0),
            ("instructions", "F1.0", 5.0, 8.0),
            ("layers", "allreduce", 6.0, 7.0),
            ("instructions", "I1.0", 8.0, 10.0),
            ("instructions", "W1.0", 10.0, 11.0),
            ("waits", "buckets", 11.0, 11.5),
            ("waits", "copies", 11.5, 12.0),
            ("instructions", "optimizer", 12.5, 13.0),
        ),
    ]
    first, second = breakdown(traces)
    assert {name: value for name, value in first.items() if value} == {
        "forward": 3.0,
        "other": 0.5,
        "total": 3.5,
    }
    assert {name: value for name, value in second.items() if value} == {
        "forward": 2.0, "input_grad": 2.0, "weight_grad": 1.0, "bubble": 3.0, "exposed_tp": 1.0,
        "exposed_pp": 2.5, "exposed_dp": 0.5, "optimizer": 0.5, "other": 0.5, "total": 13.0,
    }  # fmt: skip
    table, rows = breakdown_table(traces)
    assert rows == [first, second]
    assert table.row_count == 4
    assert len(chrome_trace(traces, {})["traceEvents"]) == 2 * (1 + len(TRACKS)) + 11
