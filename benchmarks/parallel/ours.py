"""Ours: a replica on a mesh of two ranks, as ``train.run`` makes it."""

from __future__ import annotations

import torch

import hybridcomm
from benchmarks.parallel.case import LR, Case, Competitor
from benchmarks.parallel.splits import Cut, parts_of
from hybridcomm.context import Context
from model.parts import Part
from train.batch import Packed
from train.mesh import Mesh
from train.outcome import StepTimes
from train.pipeline import check, lower, make_schedule
from train.pipeline.instructions import PipelineSchedule
from train.replica import Replica

__all__ = ["Ours", "data_parallel", "pipeline", "tensor_parallel"]


class Ours(Competitor):
    """Steps of a replica."""

    def __init__(
        self, name: str, case: Case, replica: Replica, batches: list[Packed], *, choice: str = ""
    ) -> None:
        self.name, self.choice, self.replica = name, choice, replica
        self._case, self._batches = case, batches
        self._optimizer = torch.optim.SGD(replica.parameters(), lr=LR)
        for reducer in replica.runtime.all_reducers():
            reducer.attach(self._optimizer)

    def step(self) -> float:
        self._optimizer.zero_grad()
        replicas = self.replica.mesh.dp
        times = StepTimes()
        total = self.replica.step(self._batches, replicas / self._case.predictions, times)
        self.exposed += times.exposed
        self._optimizer.step()
        return total / self._case.predictions / self.replica.mesh.tp


def _replica(
    case: Case, schedule: PipelineSchedule, parts: tuple[Part, ...], *, mesh: Mesh, ctx: Context,
    sequence: bool = False,
) -> Replica:  # fmt: skip
    check(schedule)
    return Replica(
        case.spec, parts, schedule, mesh=mesh, ctx=ctx, sequence=sequence,
        make_reducer=lambda module, group: hybridcomm.Reducer(module, ctx=group, compress=None),
    )  # fmt: skip


def pipeline(case: Case, ctx: Context, schedule: str, cut: Cut) -> Ours:
    """Two stages or more on two ranks; ``schedule`` may end with ", split head"."""
    name, _, head = schedule.partition(", ")
    lowered = lower(make_schedule(name, 2, case.microbatches), head=bool(head))
    replica = _replica(case, lowered, parts_of(cut), mesh=Mesh.over(ctx.topology, pp=2), ctx=ctx)
    return Ours("hybridcomm", case, replica, case.batches(), choice=f"{schedule} {'+'.join(map(str, cut))}")


def tensor_parallel(case: Case, ctx: Context, *, sequence: bool) -> Ours:
    """Each layer shared by two ranks; the whole step in one batch."""
    mesh = Mesh.over(ctx.topology, tp=2)
    replica = _replica(case, *_whole(case), mesh=mesh, ctx=ctx, sequence=sequence)
    return Ours(
        "hybridcomm", case, replica, case.joined(), choice="tokens split" if sequence else "tokens whole"
    )


def data_parallel(case: Case, ctx: Context, *, choice: str) -> Ours:
    """Two replicas of the whole model; ``ctx`` says whether they are on one node."""
    mesh = Mesh.over(ctx.topology)
    replica = _replica(case, *_whole(case), mesh=mesh, ctx=ctx)
    return Ours("hybridcomm", case, replica, [case.joined(2)[ctx.rank]], choice=choice)


def _whole(case: Case) -> tuple[PipelineSchedule, tuple[Part, ...]]:
    return lower(make_schedule("1f1b", 1, 1)), (Part.whole(case.layers),)
