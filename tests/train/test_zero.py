"""ZeRO-1: the bits of an optimizer that has everything, from a state that a node's replicas share out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hybridcomm.context import Context
from hybridcomm.topology import Topology
from tests.engine_ranks import engine_contexts
from tests.ranks import run_ranks
from tests.train.trained import Trained, settings, trained
from train.backend_hybrid import HybridBackend
from train.batch import Packed
from train.config import OptimConfig, TrainConfig
from train.errors import ConfigError
from train.mesh import Mesh
from train.optim import build_optimizer
from train.outcome import StepTimes
from train.zero import SharedState

OPTIM = OptimConfig(lr=0.02, warmup_steps=2, schedule="cosine", weight_decay=0.1, clip=0.5)
STEPS = 5


class Broken(HybridBackend):
    """Gets a gradient that is not finite in its third step, as all ranks do."""

    steps = 0

    def step(self, batches: Sequence[Packed], scale: float, times: StepTimes) -> float:
        loss = super().step(batches, scale, times)
        self.steps += 1
        if self.steps == 3:
            for parameter in self.module.parameters():
                parameter.grad.fill_(torch.nan)
        return loss


def run(topology: Topology, **changes: Any) -> list[Trained]:
    config = settings(max_steps=STEPS, epochs=2, optim=OPTIM, **changes)
    return trained(topology, config, Broken)


def same_weights(found: Sequence[Trained], want: Sequence[Trained]) -> None:
    for mine, theirs in zip(found, want, strict=True):
        assert mine.outcome.skipped == theirs.outcome.skipped == 1
        assert mine.outcome.loss == theirs.outcome.loss
        assert mine.weights.keys() == theirs.weights.keys()
        for name, value in theirs.weights.items():
            assert torch.equal(mine.weights[name], value), name


MESHES: dict[str, tuple[Topology, dict[str, Any], int]] = {
    "a node of two": (Topology.virtual(1, 2), {}, 2),
    "a node of three": (Topology.virtual(1, 3), {}, 3),
    "two nodes of two, top-k": (Topology.virtual(2, 2), {"compress": "topk:0.1"}, 2),
    "stages across nodes": (Topology.virtual(2, 2), {"pp": 2}, 2),
    "replicas across nodes, shared layers in them": (Topology.virtual(2, 4), {"tp": 2}, 2),
}
"""Topology, options, and how many ranks share a state."""


@pytest.mark.parametrize("name", MESHES)
def test_the_bits_of_an_optimizer_that_has_everything(name: str) -> None:
    """With weight decay, a schedule of the learning rate, clipping and a skipped step; and 1 / n of the memory."""
    topology, options, sharers = MESHES[name]
    whole, shared = run(topology, **options), run(topology, zero=1, **options)
    same_weights(shared, whole)
    for rank in range(topology.world_size):
        node = Mesh.over(topology, pp=options.get("pp", 1), tp=options.get("tp", 1)).node_replicas(rank)
        assert len(node) == sharers
        kept = [numel(shared[other]) for other in node]
        assert sum(kept) == numel(whole[rank])
        # Parts differ by a line of 16 at most, and by what each parameter's last line has too much; twice, for Adam.
        assert max(kept) - min(kept) <= 2 * 16 * (1 + len(whole[rank].gradients))


def numel(one: Trained) -> int:
    """Of Adam's mean and second moment."""
    return sum(each.numel() for each in one.state)


BUGS = {
    "parts are not gathered": ("_gather", lambda self: None),
    "gradients are not taken": ("_take_gradients", lambda self: None),
}


@pytest.mark.parametrize("bug", BUGS)
def test_control_a_planted_bug_is_noticed(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = Topology.virtual(1, 2)
    whole = run(topology)
    monkeypatch.setattr(SharedState, *BUGS[bug])
    with pytest.raises(AssertionError):
        same_weights(run(topology, zero=1), whole)


@pytest.mark.parametrize("sizes", [(1,), (15, 16, 17), (3, 100, 1, 40), (256,)])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_any_sizes_on_any_number_of_ranks(sizes: tuple[int, ...], world: int) -> None:
    """More ranks than lines, parameters that are no whole line, one without a gradient."""

    def parameters() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(2)
        return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]

    def give(own: Sequence[torch.nn.Parameter], step: int) -> None:
        for number, parameter in enumerate(own):
            skipped = len(own) > 1 and number == 1
            parameter.grad = None if skipped else torch.sin(parameter.detach() * (step + 1))

    def body(ctx: Context) -> list[torch.nn.Parameter]:
        own = parameters()
        shared = SharedState(own, ctx)
        optimizer = build_optimizer(shared.pieces, OPTIM)
        shared.attach(optimizer)
        for step in range(3):
            give(own, step)
            optimizer.step()
        return own

    want = parameters()
    optimizer = build_optimizer(want, OPTIM)
    for step in range(3):
        give(want, step)
        optimizer.step()
    with engine_contexts(Topology.virtual(1, world)) as contexts:
        found = run_ranks(body, contexts)
    for own in found:
        assert all(torch.equal(one, other) for one, other in zip(own, want, strict=True))


def test_where_it_cannot_act_it_is_refused() -> None:
    apart = Mesh.over(Topology.virtual(2, 1))
    with pytest.raises(
        ConfigError, match=r"--zero 1 .* dp 2, pp 1, tp 1 on 2 nodes none has two .* leave it out$"
    ):
        apart.check_shared_state()
    across = Mesh.over(Topology.virtual(2, 2), pp=2, outer="dp")
    with pytest.raises(ConfigError, match="or --outer pp"):
        across.check_shared_state()
    Mesh.over(Topology.virtual(2, 2), pp=2).check_shared_state()
    Mesh.over(Topology.from_sizes([2, 1])).check_shared_state()


def test_a_backend_refuses_too() -> None:
    config: TrainConfig = settings(zero=1)
    with engine_contexts(Topology.virtual(2, 1)) as contexts:
        errors = run_ranks(lambda ctx: HybridBackend(config, ctx), contexts, return_exceptions=True)
    assert all(isinstance(error, ConfigError) for error in errors)
