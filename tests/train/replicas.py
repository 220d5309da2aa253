"""Trainings of a small model on any mesh, ranks being threads, and how far two of them may lie apart."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hybridcomm.context import Context
from hybridcomm.groups import Grouping
from hybridcomm.reducer import Reducer
from model.config import ModelConfig
from model.head import HeadShard
from model.parts import Part, split
from model.recommender import Recommender
from model.sharding import shardings
from model.tensor_parallel import TensorParallel
from model.vocab import draw_negatives
from tests.numerics import gamma
from tests.train.shape import FakeGroup
from train.batch import Packed, pack, rank_share, user_draws
from train.mesh import Mesh
from train.pipeline import check, lower, make_schedule
from train.replica import ModelSpec, Replica

ITEMS, USERS, MICROBATCHES = 37, 24, 4
CONFIG = ModelConfig(dim=12, layers=4, heads=2, hidden=10, max_len=9, dropout=0.3, init_std=0.3)
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
        share = rank_share(mine, part, count)
        chosen = [histories[user] for user in share]
        draws = user_draws(share, seed=0, step=step)
        out.append(pack([h[:-1] for h in chosen], [h[1:] for h in chosen], draws))
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
    replica.module.eval()
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


def error(steps: int, config: ModelConfig = CONFIG, dtype: str = "float64") -> float:
    """How far two trainings whose sums are formed in different orders may lie apart, relatively.

    The longest chain of roundings through a step: per layer, forward and backward, four products of up to 2 hidden,
    3 dim or 64 terms and norms of dim; then the items, and the sum over a step's predictions. Both trainings err.
    """
    products = 4 * max(2 * config.hidden, 3 * config.dim, 64) + 2 * config.dim
    chain = 2 * (config.layers * products + ITEMS + 64) + max(map(predictions, range(steps)))
    return 2 * gamma(steps * chain, dtype)


def check_same_training(outcomes: Sequence[Outcome], model: ModelSpec, mesh: Mesh, want: Outcome) -> None:
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
