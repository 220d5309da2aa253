"""What runs lists: refusals, and emulated stages, whose messages are real and of the sizes that costs say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from hybridcomm.context import Context
from hybridcomm.errors import UnsupportedError
from hybridcomm.reducer import Reducer
from hybridcomm.topology import Topology
from model.config import ModelConfig
from model.parts import Part, split
from model.recommender import Recommender
from tests.engine_ranks import engine_contexts
from tests.ranks import run_ranks
from tests.train.pipeline.builders import moved
from train.batch import pack
from train.errors import ScheduleError
from train.pipeline import (
    Costs,
    Instruction,
    PipelineSchedule,
    StageCost,
    add_reduce,
    check,
    lower,
    make_schedule,
)
from train.pipeline.buckets import bucket_counts
from train.pipeline.emulated import EmulatedRuntime
from train.pipeline.stages import PipelineRuntime

WHOLE = Recommender(ModelConfig(dim=4, layers=1, heads=1, hidden=4), 5)


def costs_of(schedule: PipelineSchedule, *nbytes: int) -> Costs:
    """No time, and outputs of these sizes."""
    sizes = (nbytes or (64,)) * schedule.stages
    free = StageCost(forward=0.0, input_grad=0.0, weight_grad=0.0)
    return Costs(
        stages=tuple(dataclasses.replace(free, nbytes=sizes[stage]) for stage in range(schedule.stages))
    )


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev"])
def test_emulated_ranks_send_what_the_list_says(name: str) -> None:
    """Stages hand on 4, 8, 12, ... KiB: a receive of another size would be an error that names both."""
    schedule = lower(make_schedule(name, 3, 4))
    check(schedule)
    sizes = [4096 * (stage + 1) for stage in range(schedule.stages)]
    costs = costs_of(schedule, *sizes)
    with engine_contexts(Topology.virtual(3, 1)) as contexts:

        def body(ctx: Context) -> int:
            runtime = EmulatedRuntime(schedule, ctx.rank, costs, group=ctx)
            for _ in range(2):
                assert runtime.step().work == 0
            ctx.barrier()
            return ctx.counters()["wire_tx_bytes"]

        sent = run_ranks(body, contexts)
    for rank, nbytes in enumerate(sent):
        out = sum(
            sizes[entry.stage if entry.op == "SEND_F" else entry.stage - 1]
            for entry in schedule.lists[rank]
            if entry.op.startswith("SEND")
        )
        assert 2 * out <= nbytes < 2 * out + 20_000  # headers, answers, the barrier


def test_emulated_time_is_what_costs_say() -> None:
    """Never less: each computation lasts at least its time."""
    schedule = lower(make_schedule("1f1b", 1, 3))
    cost = StageCost(forward=2e-3, input_grad=1e-3, weight_grad=1e-3)
    step = EmulatedRuntime(schedule, 0, Costs(stages=(cost,))).step()
    assert step.work == pytest.approx(3 * 4e-3)
    assert step.seconds >= step.work


def test_refusals() -> None:
    two, one = lower(make_schedule("1f1b", 2, 2)), lower(make_schedule("1f1b", 1, 2))
    with pytest.raises(ScheduleError, match="needs a group, and to be lowered"):
        EmulatedRuntime(two, 0, costs_of(two))
    with pytest.raises(ScheduleError, match=r"rank 0 holds stages \(0,\) .* was given \(0, 1\)"):
        PipelineRuntime(one, 0, {0: WHOLE, 1: WHOLE})
    with pytest.raises(ScheduleError, match="1 microbatches for a schedule of 2"):
        PipelineRuntime(one, 0, {0: WHOLE}).step([None])  # type: ignore[list-item]
    split = lower(make_schedule("1f1b+1", 1, 2), head=True)
    with pytest.raises(ScheduleError, match="has split head: give its shard and exchange"):
        PipelineRuntime(split, 0, {0: WHOLE})
    with pytest.raises(ScheduleError, match="give an exchange for a split head"):
        EmulatedRuntime(split, 0, costs_of(split))
    reduced = lower(make_schedule("1f1b", 1, 2), buckets=1)
    with pytest.raises(ScheduleError, match="reduces buckets: give them, or lower without"):
        EmulatedRuntime(reduced, 0, costs_of(reduced))


# -- buckets -----------------------------------------------------------------------------------------------------


def model_of(layers: int, stages: int) -> dict[int, Recommender]:
    config = ModelConfig(dim=4, layers=layers, heads=1, hidden=4, dropout=0.0)
    return {stage: Recommender(config, 5, part=part) for stage, part in enumerate(split(layers, stages))}


def played(
    name: str, change: Callable[[PipelineSchedule], PipelineSchedule] = lambda schedule: schedule
) -> tuple[list[str], list[str]]:
    """A lone rank's list, and what it does: its instructions as they begin, ``stage/bucket`` where that is launched."""
    schedule = lower(make_schedule(name, 1, 2))
    log: list[str] = []
    stages = model_of(2 * schedule.stages, schedule.stages)
    with engine_contexts(Topology.virtual(1, 1)) as (ctx,):
        reducers = {stage: Reducer(module, ctx=ctx, bucket_cap_mb=1e-4) for stage, module in stages.items()}
        for stage, reducer in reducers.items():
            real = reducer._launch
            reducer._launch = lambda layout, real=real, stage=stage: (  # type: ignore[method-assign]
                log.append(f"{stage}/{layout.index}"), real(layout))[1]  # fmt: skip
        schedule = change(add_reduce(schedule, bucket_counts(schedule, 0, reducers, None)))
        assert min(schedule.buckets) >= 3
        runtime = PipelineRuntime(schedule, 0, stages, reducers=reducers)
        for op, run in runtime._ops.items():
            runtime._ops[op] = lambda step, entry, run=run: (log.append(str(entry)), run(step, entry))
        user = [np.array([1, 2, 3])]
        batches = [pack(user, user)] * schedule.microbatches
        for _ in range(2):
            log.clear()
            runtime.step(batches)
    return [str(entry) for entry in schedule.lists[0]], log


def test_buckets_behind_their_stage_go_while_it_still_computes() -> None:
    texts, log = played("1f1b")
    buckets = [text for text in texts if text.startswith("REDUCE")]
    assert texts[-len(buckets) - 1 :] == ["B0.1", *buckets]
    assert log[log.index("B0.1") :] == [
        "B0.1", *(text.removeprefix("REDUCE") for text in buckets), *buckets,
    ]  # fmt: skip


@pytest.mark.parametrize("by", [2, 4])
def test_a_bucket_is_launched_where_the_list_says(by: int) -> None:
    """Behind other computation: it waits until then, and so do those behind it."""

    def later(schedule: PipelineSchedule) -> PipelineSchedule:
        for bucket in reversed(range(schedule.buckets[1])):
            schedule = moved(schedule, 0, Instruction("REDUCE", 1, bucket=bucket), by)
        check(schedule)
        return schedule

    texts, log = played("zbv", later)
    assert [text for text in log if "/" not in text or text.startswith("REDUCE")] == texts
    assert log[log.index("REDUCE1/0") + 1] == "1/0"
    assert log[log.index("REDUCE1/1") + 1] == "1/1"
    assert texts.index("REDUCE1/0") > texts.index("W1.1") + 1


def test_control_a_bucket_reduced_one_op_early_is_noticed() -> None:

    def early(schedule: PipelineSchedule) -> PipelineSchedule:
        return moved(schedule, 0, Instruction("REDUCE", 1, bucket=0), -1)

    with pytest.raises(ScheduleError, match=r"stands before its W1\.1"):
        check(early(lower(make_schedule("zbv", 1, 2), buckets=2)))
    with pytest.raises(ScheduleError, match="REDUCE1/0: not all gradients of the bucket are complete"):
        played("zbv", early)


def test_a_bucket_without_a_reducer_is_told() -> None:
    reduced = lower(make_schedule("1f1b", 1, 1), buckets=1)
    runtime = PipelineRuntime(reduced, 0, {0: WHOLE})
    with pytest.raises(ScheduleError, match="REDUCE0/0: there are no reducers"):
        runtime.step([pack([], [])])


def test_a_part_that_continues_needs_its_input() -> None:
    part = Recommender(WHOLE.config, 5, part=Part(layers=range(1), scores=True))
    with pytest.raises(UnsupportedError, match="continues another one"):
        part(*[torch.zeros(1, 1, dtype=torch.int64)] * 3, torch.zeros(1, dtype=torch.int64))
