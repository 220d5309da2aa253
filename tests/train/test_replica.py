"""Any composition of replicas, stages and shares of layers gives one process's losses and gradients."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridcomm.context import Context
from hybridcomm.groups import Grouping
from hybridcomm.reducer import Reducer
from hybridcomm.topology import Topology
from model import head as head_module
from model import scores
from model.config import ModelConfig
from model.head import HeadShard
from model.parts import Part, split
from model.ranking import NotFiniteError
from model.recommender import Recommender
from model.scores import Columns
from model.sharding import shardings
from model.tensor_parallel import TensorParallel
from model.vocab import draw_negatives
from tests.engine_ranks import engine_contexts
from tests.numerics import gamma
from tests.ranks import run_ranks
from tests.train.shape import FakeGroup
from train import replica as replica_module
from train.batch import Packed, pack, rank_share
from train.errors import ConfigError
from train.mesh import Mesh
from train.pipeline import SCHEDULES, check, lower, make_schedule
from train.replica import ModelSpec, Replica

ITEMS, USERS, MICROBATCHES = 37, 24, 4
CONFIG = ModelConfig(dim=12, layers=4, heads=2, hidden=10, max_len=9, dropout=0.0, init_std=0.3)
BUILDING = threading.Lock()


class ThreadReplica(Replica):
    """Ranks are threads here, and models draw from torch's one generator."""

    def _make(self, spec: ModelSpec, part: Part) -> Recommender:
        with BUILDING:
            return super()._make(spec, part)

    def _make_head(self, spec: ModelSpec, ctx: Grouping) -> HeadShard:
        with BUILDING:
            return super()._make_head(spec, ctx)


def spec(
    dtype: torch.dtype = torch.float64, *, tied: bool = True, text: bool = True, layers: int = 4
) -> ModelSpec:
    features = torch.randn(ITEMS, 5, generator=torch.Generator().manual_seed(3)) if text else None
    config = CONFIG.model_copy(update={"tied": tied, "layers": layers})
    return ModelSpec(config=config, num_items=ITEMS, features=features, seed=5, dtype=dtype)


def users(step: int) -> list[np.ndarray]:
    dice = np.random.default_rng(step)
    return [dice.integers(0, ITEMS, int(dice.integers(2, 9))) for _ in range(USERS)]


def microbatches(step: int, dp: int, size: int, count: int) -> list[Packed]:
    """Of replica ``dp`` of ``size``: ragged, since users have histories of all lengths."""
    histories = users(step)
    mine = rank_share(np.arange(USERS), dp, size)
    out = []
    for part in range(count):
        chosen = [histories[user] for user in rank_share(mine, part, count)]
        out.append(pack([h[:-1] for h in chosen], [h[1:] for h in chosen]))
    return out


def predictions(step: int) -> int:
    return sum(len(history) - 1 for history in users(step))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    ranks: tuple[int, ...]
    """Of the targets of one batch, after training."""
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def train(
    ctx: Context,
    model: ModelSpec,
    schedule: str,
    *,
    pp: int = 1,
    tp: int = 1,
    outer: str = "pp",
    steps: int = 3,
    count: int = MICROBATCHES,
    chunks: int | None = None,
    sequence: bool = False,
    head: bool = False,
    lr: float = 0.1,
    negatives: int = 0,
) -> Outcome:
    """SGD over a few steps: losses per prediction, and this rank's shares of the last gradients and weights."""
    node = ctx.connect_node() if tp > 1 else None
    mesh = Mesh.over(ctx.topology, pp=pp, tp=tp, outer=outer)  # type: ignore[arg-type]
    lowered = lower(make_schedule(schedule, pp, count, chunks=chunks), head=head)
    parts = split(model.config.layers, lowered.stages, head=0.0 if head else 1.5)
    replica = ThreadReplica(
        model, parts, lowered, mesh=mesh, ctx=ctx, node=node, sequence=sequence,
        make_reducer=lambda module, group: Reducer(module, ctx=group, sync_parameters=False),
    )  # fmt: skip
    check(replica.schedule)
    optimizer = torch.optim.SGD(replica.parameters(), lr=lr)
    for reducer in replica.runtime.all_reducers():
        reducer.attach(optimizer)
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        batches = microbatches(step, replica.place.dp, mesh.dp, count)
        if negatives:
            drawn = draw_negatives(ITEMS, negatives, seed=step)
            batches = [replace(batch, negatives=drawn) for batch in batches]
        own = replica.step(batches, mesh.dp / predictions(step))
        total = torch.tensor([replica.loss_of_all(own)], dtype=torch.float64)
        if mesh.dp > 1:
            mesh.group("dp", ctx).allreduce(total)
        losses.append(float(total) / predictions(step))
        norms.append(float(replica.gradient_norm()))
        optimizer.step()
    named, batch = replica.named_parameters(), microbatches(99, 0, 1, 1)[0]
    nothing = [np.zeros(0, np.int64)] * len(batch.targets)
    ranks = replica.target_ranks(batch, nothing).tolist()
    if node is not None:
        node.close()
    return Outcome(
        losses=tuple(losses),
        norms=tuple(norms),
        ranks=tuple(ranks),
        gradients={name: p.grad.clone() for name, p in named.items() if p.grad is not None},
        weights={name: p.detach().clone() for name, p in named.items()},
    )


def whole(outcomes: Sequence[Outcome], model: ModelSpec, mesh: Mesh) -> dict[str, Tensor]:
    """The whole model's weights from the shares of the first replica's ranks."""
    fake = TensorParallel(group=FakeGroup(mesh.tp) if mesh.tp > 1 else None)  # type: ignore[arg-type]
    with BUILDING:
        split_names = shardings(Recommender(model.config, model.num_items, model.features, tp=fake))
    out: dict[str, Tensor] = {}
    for stage_rank in mesh.along("pp", 0):
        shares = [outcomes[rank].weights for rank in mesh.along("tp", stage_rank)]
        for name, own in shares[0].items():
            split_name = split_names.get(name)
            if name != "head.embedding":
                out[name] = own if split_name is None else split_name.join([share[name] for share in shares])
    # A table that is only scored: in ranges by tp, each shared out over the pipeline where the head is split.
    rows = [
        outcomes[rank].weights["head.embedding"]
        for tp_rank in mesh.along("tp", 0)
        for rank in mesh.along("pp", tp_rank)
        if "head.embedding" in outcomes[rank].weights
    ]
    return out | ({"head.embedding": torch.cat(rows)} if rows else {})


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


def error(steps: int, config: ModelConfig = CONFIG, dtype: str = "float64") -> float:
    """How far two trainings whose sums are formed in different orders may lie apart, relatively.

    The longest chain of roundings through a step: per layer, forward and backward, four products of up to 2 hidden,
    3 dim or 64 terms and norms of dim; then the items, and the sum over a step's predictions. Both trainings err.
    """
    products = 4 * max(2 * config.hidden, 3 * config.dim, 64) + 2 * config.dim
    chain = 2 * (config.layers * products + ITEMS + 64) + max(map(predictions, range(steps)))
    return 2 * gamma(steps * chain, dtype)


def same_training(outcomes: Sequence[Outcome], model: ModelSpec, mesh: Mesh, want: Outcome) -> None:
    relative = error(len(want.losses), model.config)
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.losses, want.losses, rtol=relative)
        np.testing.assert_allclose(outcome.norms, want.norms, rtol=relative)
        assert outcome.ranks == want.ranks
        assert len(set(want.ranks)) > 10
    got = whole(outcomes, model, mesh)
    assert got.keys() == want.weights.keys()
    for name, weight in want.weights.items():
        bound = relative * float(weight.abs().max())
        torch.testing.assert_close(got[name], weight, rtol=0.0, atol=bound, msg=name)


@pytest.mark.parametrize(("world", "pp", "tp"), COMPOSITIONS)
def test_every_composition_has_one_processs_losses(world: int, pp: int, tp: int, alone: Outcome) -> None:
    with engine_contexts(Topology.virtual(*TOPOLOGIES[world])) as contexts:
        outcomes = run_ranks(lambda ctx: train(ctx, spec(), "1f1b", pp=pp, tp=tp), contexts)
        same_training(outcomes, spec(), Mesh.over(contexts[0].topology, pp=pp, tp=tp), alone)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_replicas_across_nodes_and_split_tokens(schedule: str, alone: Outcome) -> None:
    """dp is the outer axis here, so stages are neighbours in a node; tokens are split between the layers."""
    with engine_contexts(Topology.virtual(2, 4)) as contexts:
        outcomes = run_ranks(
            lambda ctx: train(ctx, spec(), schedule, pp=2, tp=2, outer="dp", sequence=True), contexts
        )
        mesh = Mesh.over(contexts[0].topology, pp=2, tp=2, outer="dp")
    same_training(outcomes, spec(), mesh, alone)


@pytest.mark.parametrize(("schedule", "pp", "tp", "sequence"), [("zbv", 2, 2, True), ("1f1b", 1, 4, False)])
def test_drawn_items_give_the_same_on_any_mesh(schedule: str, pp: int, tp: int, sequence: bool) -> None:
    with engine_contexts(Topology.virtual(1, 1)) as contexts:
        want = run_ranks(lambda ctx: train(ctx, spec(), "1f1b", count=8, negatives=11), contexts)[0]
    with engine_contexts(Topology.virtual(2, 4)) as contexts:
        outcomes = run_ranks(
            lambda ctx: train(ctx, spec(), schedule, pp=pp, tp=tp, sequence=sequence, negatives=11), contexts
        )
        mesh = Mesh.over(contexts[0].topology, pp=pp, tp=tp)
    same_training(outcomes, spec(), mesh, want)


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
        same_training(outcomes, spec(), Mesh.over(contexts[0].topology, pp=pp, tp=tp), alone)


@pytest.mark.parametrize(("pp", "tp"), [(2, 1), (2, 2)])
def test_a_split_head_with_a_table_of_its_own(pp: int, tp: int) -> None:
    model = spec(tied=False)
    with engine_contexts(Topology.virtual(1, 1)) as contexts:
        want = run_ranks(lambda ctx: train(ctx, model, "1f1b"), contexts)[0]
    with engine_contexts(Topology.virtual(pp, tp)) as contexts:
        outcomes = run_ranks(lambda ctx: train(ctx, model, "1f1b", pp=pp, tp=tp, head=True), contexts)
        same_training(outcomes, model, Mesh.over(contexts[0].topology, pp=pp, tp=tp), want)


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


def _scored_twice(hidden: Tensor, table: Tensor, columns: Columns, mean: Tensor) -> Tensor:
    """The second shard's items count double in the sum, and in the states' gradient."""
    statistics = scores.fold(hidden, table, columns, mean)
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
            same_training(
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
        same_training(outcomes, spec(), mesh, alone)
