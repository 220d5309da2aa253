"""Any composition of replicas, stages and shares of layers gives one process's losses and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybridcomm.context import Context
from hybridcomm.topology import Topology
from model.parts import split
from tests.engine_ranks import engine_contexts
from tests.ranks import run_ranks
from tests.train.replicas import Outcome, ThreadReplica, check_same_training, microbatches, spec, train
from train import replica as replica_module
from train.mesh import Mesh
from train.pipeline import SCHEDULES, lower, make_schedule
from train.replica import Replica


@pytest.fixture(scope="module")
def alone() -> Outcome:
    with engine_contexts(Topology.virtual(1, 1)) as contexts:
        return run_ranks(lambda ctx: train(ctx, spec(), "1f1b", count=8), contexts)[0]


TOPOLOGIES = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4)}
COMPOSITIONS = [
    (world, pp, tp)
    for world in (1, 2, 4, 8)
    for pp in (1, 2, 4, 8)
    for tp in (1, 2, 4)
    if world % (pp * tp) == 0 and tp <= TOPOLOGIES[world][1] and pp <= 4
]


@pytest.mark.parametrize(("world", "pp", "tp"), COMPOSITIONS)
def test_every_composition_has_one_processs_losses(world: int, pp: int, tp: int, alone: Outcome) -> None:
    with engine_contexts(Topology.virtual(*TOPOLOGIES[world])) as contexts:
        outcomes = run_ranks(lambda ctx: train(ctx, spec(), "1f1b", pp=pp, tp=tp), contexts)
        check_same_training(outcomes, spec(), Mesh.over(contexts[0].topology, pp=pp, tp=tp), alone)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_replicas_across_nodes_and_split_tokens(schedule: str, alone: Outcome) -> None:
    """dp is the outer axis here, so stages are neighbours in a node; tokens are split between the layers."""
    with engine_contexts(Topology.virtual(2, 4)) as contexts:
        outcomes = run_ranks(
            lambda ctx: train(ctx, spec(), schedule, pp=2, tp=2, outer="dp", sequence=True), contexts
        )
        mesh = Mesh.over(contexts[0].topology, pp=2, tp=2, outer="dp")
    check_same_training(outcomes, spec(), mesh, alone)


@pytest.mark.parametrize(("schedule", "pp", "tp", "sequence"), [("zbv", 2, 2, True), ("1f1b", 1, 4, False)])
def test_drawn_items_give_the_same_on_any_mesh(schedule: str, pp: int, tp: int, sequence: bool) -> None:
    with engine_contexts(Topology.virtual(1, 1)) as contexts:
        want = run_ranks(lambda ctx: train(ctx, spec(), "1f1b", count=8, negatives=11), contexts)[0]
    with engine_contexts(Topology.virtual(2, 4)) as contexts:
        outcomes = run_ranks(
            lambda ctx: train(ctx, spec(), schedule, pp=pp, tp=tp, sequence=sequence, negatives=11), contexts
        )
        mesh = Mesh.over(contexts[0].topology, pp=pp, tp=tp)
    check_same_training(outcomes, spec(), mesh, want)


# -- stages: the same bits -----------------------------------------------------------------------------------

SPLIT = [(name, 2, count) for name in SCHEDULES for count in (1, 3, 5)] + [("zbv", 4, 6), ("1f1b", 4, 2)]


@pytest.mark.parametrize(("schedule", "pp", "count"), SPLIT)
def test_stages_give_the_bits_of_one_process(schedule: str, pp: int, count: int) -> None:
    """In fp32, untied: each parameter is in one stage, and its gradients are added in the order of microbatches."""
    model = spec(torch.float32, tied=False, layers=6)
    with engine_contexts(Topology.virtual(1, 1)) as contexts:
        want = run_ranks(lambda ctx: train(ctx, model, "1f1b", count=count, steps=2), contexts)[0]
    with engine_contexts(Topology.virtual(1, pp)) as contexts:
        outcomes = run_ranks(lambda ctx: train(ctx, model, schedule, pp=pp, count=count, steps=2), contexts)
    assert all(outcome.losses == want.losses for outcome in outcomes)
    got = {name: g for outcome in outcomes for name, g in outcome.gradients.items()}
    assert sum(len(outcome.gradients) for outcome in outcomes) == len(got) == len(want.gradients)
    for name, gradient in want.gradients.items():
        assert torch.equal(got[name], gradient), name
        assert gradient.abs().sum() > 0, name


def test_no_step_waits_for_the_loss() -> None:
    """It stays where it was computed until it is asked for."""
    losses: dict[int, tuple[float, float]] = {}

    def body(ctx: Context) -> None:
        lowered = lower(make_schedule("1f1b", 2, 3))
        replica = ThreadReplica(
            spec(), split(4, 2), lowered, mesh=Mesh.over(ctx.topology, pp=2), ctx=ctx,
            make_reducer=lambda *_: pytest.fail("one replica"),
        )  # fmt: skip
        own = replica.step(microbatches(0, 0, 1, 3))
        losses[ctx.rank] = own, replica.loss_of_all(own)

    with engine_contexts(Topology.virtual(1, 2)) as contexts:
        run_ranks(body, contexts)
    (first, told), (last, kept) = losses[0], losses[1]
    assert (first, told) == (0.0, last)
    assert kept == last > 0


# -- planted bugs --------------------------------------------------------------------------------------------


REAL_STEP, REAL_NORM = Replica.step, Replica.gradient_norm


def part_norm(replica: Replica) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in replica.parameters() if p.grad is not None])


def norm_with_copies(replica: Replica) -> Tensor:
    tie, replica._tie = replica._tie, None
    try:
        return REAL_NORM(replica)
    finally:
        replica._tie = tie


BUGS = {
    "the copies of the table are not summed": (replica_module, "sum_copies", lambda *_: None),
    "text gradients are not summed over tp": (replica_module, "sum_partial_gradients", lambda *_: None),
    "the norm is that of this rank's part": (Replica, "gradient_norm", part_norm),
    "the table's copies count twice in the norm": (Replica, "gradient_norm", norm_with_copies),
    "the loss stays with the last stage": (Replica, "loss_of_all", lambda _, loss: loss),
    "the first microbatch counts twice": (
        Replica, "step", lambda self, batches, scale: REAL_STEP(self, [batches[0], *batches[:-1]], scale),
    ),
    "the mean of replicas is not scaled back": (
        Replica, "step", lambda self, batches, scale: REAL_STEP(self, batches, scale / 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_control_a_planted_bug_is_noticed(bug: str, alone: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BUGS[bug])
    with engine_contexts(Topology.virtual(2, 4)) as contexts:
        outcomes = run_ranks(lambda ctx: train(ctx, spec(), "1f1b", pp=2, tp=2), contexts)
        mesh = Mesh.over(contexts[0].topology, pp=2, tp=2)
    with pytest.raises(AssertionError):
        check_same_training(outcomes, spec(), mesh, alone)
