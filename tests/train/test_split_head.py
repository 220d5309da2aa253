"""A head split over the pipeline gives one process's losses and gradients, on any mesh; bugs are noticed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybridcomm.reducer import Reducer
from hybridcomm.topology import Topology
from model import head as head_module
from model import scores
from model.head import HeadShard
from model.parts import split
from model.ranking import NotFiniteError
from model.scores import Columns
from tests.engine_ranks import engine_contexts
from tests.ranks import run_ranks
from tests.train.replicas import Outcome, check_same_training, spec, train
from tests.train.shape import FakeGroup
from train import replica as replica_module
from train.errors import ConfigError
from train.mesh import Mesh
from train.pipeline import lower, make_schedule
from train.replica import Replica


@pytest.fixture(scope="module")
def alone() -> Outcome:
    with engine_contexts(Topology.virtual(1, 1)) as contexts:
        return run_ranks(lambda ctx: train(ctx, spec(), "1f1b", count=8), contexts)[0]


SPLIT_HEADS = [
    ("1f1b", 2, 1, 1, {}),
    ("1f1b+1", 4, 1, 2, {}),
    ("1f1b", 2, 2, 2, {}),
    ("zbv", 2, 1, 2, {}),
    ("zbv", 2, 2, 1, {"sequence": True}),
    ("interleaved+1", 2, 1, 1, {}),
    ("1f1b", 3, 1, 1, {}),
]


@pytest.mark.parametrize(("schedule", "pp", "tp", "dp", "options"), SPLIT_HEADS)
def test_a_split_head_gives_the_same(
    schedule: str, pp: int, tp: int, dp: int, options: dict[str, bool], alone: Outcome
) -> None:
    """Tied: 37 items in uneven shards that are copies of rows of the first stage's table, text projection included."""
    with engine_contexts(Topology.virtual(pp * dp, tp)) as contexts:
        outcomes = run_ranks(
            lambda ctx: train(ctx, spec(), schedule, pp=pp, tp=tp, head=True, **options), contexts
        )
        check_same_training(outcomes, spec(), Mesh.over(contexts[0].topology, pp=pp, tp=tp), alone)


@pytest.mark.parametrize(("pp", "tp"), [(2, 1), (2, 2)])
def test_a_split_head_with_a_table_of_its_own(pp: int, tp: int) -> None:
    model = spec(tied=False)
    with engine_contexts(Topology.virtual(1, 1)) as contexts:
        want = run_ranks(lambda ctx: train(ctx, model, "1f1b"), contexts)[0]
    with engine_contexts(Topology.virtual(pp, tp)) as contexts:
        outcomes = run_ranks(lambda ctx: train(ctx, model, "1f1b", pp=pp, tp=tp, head=True), contexts)
        check_same_training(outcomes, model, Mesh.over(contexts[0].topology, pp=pp, tp=tp), want)


# -- planted bugs --------------------------------------------------------------------------------------------


def _scored_twice(
    hidden: Tensor, table: Tensor, columns: Columns, mean: Tensor, *, kept: scores.Kept
) -> Tensor:
    """The second shard's items count double in the sum, and in the states' gradient."""
    statistics = scores.fold(hidden, table, columns, mean, kept=kept)
    if columns.tp.rank == 1:
        statistics[1] *= 2
        mean *= 2
    return statistics


HEAD_BUGS = {
    "a head shard scored twice": (head_module, "fold", _scored_twice),
    "shards and embedding are not summed": (replica_module, "sum_shards", lambda *_, **__: None),
    "targets are taken off by nobody": (
        HeadShard, "states_gradient",
        lambda self, parts, every, targets, scale: REAL_GRADIENT(
            self, [(r, part * (torch.arange(len(part)) < len(targets))[:, None]) for r, part in parts],
            every, targets, scale,
        ),
    ),
    "the parts of the gradient are not scaled": (
        HeadShard, "states_gradient",
        lambda self, parts, every, *rest: REAL_GRADIENT(self, parts, torch.zeros_like(every), *rest),
    ),
}  # fmt: skip
REAL_GRADIENT = HeadShard.states_gradient


@pytest.mark.parametrize("bug", HEAD_BUGS)
def test_control_a_bug_in_the_split_head_is_noticed(
    bug: str, alone: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*HEAD_BUGS[bug])
    with engine_contexts(Topology.virtual(2, 1)) as contexts:
        mesh = Mesh.over(contexts[0].topology, pp=2)
        with pytest.raises((AssertionError, NotFiniteError)):  # wrong, or so wrong that it diverges
            check_same_training(
                run_ranks(lambda ctx: train(ctx, spec(), "1f1b", pp=2, head=True), contexts),
                spec(), mesh, alone,
            )  # fmt: skip


def test_a_split_head_refuses_to_stand_in_the_queue_of_layers() -> None:
    lowered = lower(make_schedule("1f1b", 2, 2), head=True)
    parts = split(4, 2, head=0.0)
    topology = Topology.virtual(2, 2)
    group = FakeGroup(4)
    for mesh, schedule in (
        (Mesh.over(topology, pp=2, tp=2), lowered),
        (Mesh.over(topology), lower(make_schedule("1f1b", 1, 2), head=True)),
    ):
        with pytest.raises(ConfigError, match="a split head needs a pipeline, and with tp a context"):
            Replica(spec(), parts[: mesh.pp], schedule, mesh=mesh, ctx=group, make_reducer=Reducer)  # type: ignore[arg-type]
