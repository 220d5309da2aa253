"""Tensor, pipeline and data parallelism together on real data: losses are those of one process, step by step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridcomm.context import Context
from hybridcomm.reducer import Reducer
from hybridcomm.topology import Topology
from model.config import ModelConfig
from model.parts import split
from tests.engine_ranks import engine_contexts
from tests.ranks import run_ranks
from tests.train.replicas import ThreadReplica
from train.batch import epoch_order, rank_share, step_users, train_batch
from train.config import OptimConfig
from train.data import Dataset, Split, load_directory, split_leave_one_out
from train.mesh import Mesh
from train.optim import build_optimizer, learning_rate
from train.pipeline import check, lower, make_schedule
from train.replica import ModelSpec
from train.text import text_features

STEPS, USERS_PER_STEP = 50, 64
OPTIM = OptimConfig(lr=3e-3, warmup_steps=10)

pytestmark = [
    pytest.mark.xdist_group("real data"),  # one worker: the losses of one process are computed once
    pytest.mark.data,
    pytest.mark.skipif("HYBRIDCOMM_DATA" not in os.environ, reason="HYBRIDCOMM_DATA names no data folder"),
]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The model and the data that it is trained on."""

    data: Dataset
    split: Split
    spec: ModelSpec

    def users(self, steps: int) -> Iterator[np.ndarray]:
        """Of each step, all replicas': an epoch's order after the other."""
        every = np.flatnonzero(self.split.train_ends >= 2)
        done = 0
        for epoch in range(steps):
            for users in step_users(every[epoch_order(len(every), 0, epoch)], USERS_PER_STEP):
                yield users
                done += 1
                if done == steps:
                    return

    def predictions(self, users: np.ndarray) -> int:
        return int((np.minimum(self.split.train_ends[users], self.spec.config.max_len + 1) - 1).sum())


@pytest.fixture(scope="module")
def job() -> Job:
    """amazon-scientific-2018 with the text of its items, with dropout, in fp64."""
    data = load_directory(Path(os.environ["HYBRIDCOMM_DATA"]) / "amazon-scientific-2018")
    assert data.texts is not None
    spec = ModelSpec(
        config=ModelConfig(layers=4),
        num_items=data.num_items,
        features=text_features(data.texts, 64).double(),
        dtype=torch.float64,
    )
    return Job(data=data, split=split_leave_one_out(data), spec=spec)


def losses(
    ctx: Context, job: Job, *, pp: int = 1, tp: int = 1, steps: int = STEPS, bug: bool = False
) -> list[float]:
    """Mean loss of each step over all replicas. ``bug``: replicas divide by their own predictions."""
    mesh = Mesh.over(ctx.topology, pp=pp, tp=tp)
    pieces = 2 * pp if pp > 1 else 1
    schedule = lower(make_schedule("zbv" if pp > 1 else "1f1b", pp, pieces))
    check(schedule)
    max_len = job.spec.config.max_len
    parts = split(job.spec.config.layers, schedule.stages, head=0.9)  # a layer in each of ZBV's four stages
    replica = ThreadReplica(
        job.spec, parts, schedule, mesh=mesh, ctx=ctx,
        make_reducer=lambda module, group: Reducer(module, ctx=group),
    )  # fmt: skip
    optimizer = build_optimizer(replica.parameters(), OPTIM)
    for reducer in replica.runtime.all_reducers():
        reducer.attach(optimizer)
    out = []
    for step, users in enumerate(job.users(steps)):
        share = rank_share(users, replica.place.dp, mesh.dp)
        batches = [
            train_batch(job.data, job.split, rank_share(share, part, pieces), max_len, step=step)
            for part in range(pieces)
        ]
        optimizer.zero_grad()
        divisor = mesh.dp * job.predictions(share) if bug else job.predictions(users)
        loss = replica.loss_of_all(replica.step(batches, mesh.dp / divisor))
        total = torch.tensor([loss], dtype=torch.float64)
        if mesh.dp > 1:
            mesh.group("dp", ctx).allreduce(total)
        out.append(float(total) / job.predictions(users))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, STEPS)
        optimizer.step()
    return out


@pytest.fixture(scope="module")
def alone(job: Job) -> list[float]:
    with engine_contexts(Topology.virtual(1, 1)) as contexts:
        found: list[float] = run_ranks(lambda ctx: losses(ctx, job), contexts, timeout=200)[0]
    return found


@pytest.mark.timeout(300)
def test_losses_of_tp_pp_and_dp_are_one_processs_for_50_steps(job: Job, alone: list[float]) -> None:
    """Eight ranks on two virtual nodes, tied weights, text of items, Adam; the default schedule."""
    with engine_contexts(Topology.virtual(2, 4), timeout=120) as contexts:
        found = run_ranks(lambda ctx: losses(ctx, job, pp=2, tp=2), contexts, timeout=250)
    assert len(alone) == STEPS
    assert alone[-1] < alone[0] - 0.5  # it learns: late steps depend on all gradients before
    for own in found:
        np.testing.assert_allclose(own, alone, rtol=1e-9)


@pytest.mark.timeout(300)
def test_control_a_mean_of_means_is_noticed(job: Job, alone: list[float]) -> None:
    """Replicas have different numbers of predictions, so a mean of their means is another gradient."""
    steps = 4
    with engine_contexts(Topology.virtual(2, 4), timeout=120) as contexts:
        found = run_ranks(
            lambda ctx: losses(ctx, job, pp=2, tp=2, steps=steps, bug=True), contexts, timeout=250
        )
    np.testing.assert_allclose(found[0][0], alone[0], rtol=1e-9)  # before the first step nothing is wrong yet
    assert np.abs(np.array(found[0][1:]) / alone[1:steps] - 1).min() > 1e-7
