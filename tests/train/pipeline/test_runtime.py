"""What runs lists: refusals, and emulated stages, whose messages are real and of the sizes that costs say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hybridcomm.context import Context
from hybridcomm.errors import UnsupportedError
from hybridcomm.topology import Topology
from model.config import ModelConfig
from model.parts import Part
from model.recommender import Recommender
from tests.engine_ranks import engine_contexts
from tests.ranks import run_ranks
from train.batch import pack
from train.errors import ScheduleError
from train.pipeline import Costs, PipelineSchedule, StageCost, check, lower, make_schedule
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
    with pytest.raises(ScheduleError, match="no split head"):
        PipelineRuntime(split, 0, {0: WHOLE})
    reduced = lower(make_schedule("1f1b", 1, 2), buckets=1)
    with pytest.raises(ScheduleError, match="nothing is reduced"):
        EmulatedRuntime(reduced, 0, costs_of(reduced))


def test_a_bucket_that_is_not_launched_is_told() -> None:
    """REDUCE stands where its bucket is complete; without a reducer nothing has been launched."""
    reduced = lower(make_schedule("1f1b", 1, 1), buckets=1)
    runtime = PipelineRuntime(reduced, 0, {0: WHOLE})
    with pytest.raises(ScheduleError, match=r"REDUCE0/0: not all gradients .* or it has no reducer"):
        runtime.step([pack([], [])])


def test_a_part_that_continues_needs_its_input() -> None:
    part = Recommender(WHOLE.config, 5, part=Part(layers=range(1), scores=True))
    with pytest.raises(UnsupportedError, match="continues another one"):
        part(*[torch.zeros(1, 1, dtype=torch.int64)] * 3, torch.zeros(1, dtype=torch.int64))
