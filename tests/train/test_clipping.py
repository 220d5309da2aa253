"""Gradients are clipped by the norm of the whole model's, whatever part of it a rank has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridcomm.topology import Topology
from tests.numerics import gamma
from tests.train.trained import DATA, MODEL, Trained, settings, trained
from train.config import OptimConfig
from train.replica import Replica

STEPS, CLIP = 3, 0.25
# Adam's epsilon is large beside the gradients: updates are in proportion to them, so clipping changes every one.
OPTIM = OptimConfig(lr=2.0, eps=1.0, warmup_steps=0, schedule="constant", clip=CLIP)


def run(topology: Topology, clip: float = CLIP, **options: Any) -> Trained:
    optim = OPTIM.model_copy(update={"clip": clip})
    return trained(topology, settings(max_steps=STEPS, optim=optim, microbatches=2, **options))[0]


def error(loss: float) -> float:
    """Of two fp32 trainings whose sums are formed in different orders: blocks, items and a step's predictions."""
    products = 4 * max(2 * MODEL.hidden, 3 * MODEL.dim, 64) + 2 * MODEL.dim
    chain = 2 * (MODEL.layers * products + DATA.num_items + 64) + 8 * MODEL.max_len
    return 2 * gamma(STEPS * chain, "float32") * loss


@pytest.fixture(scope="module")
def alone() -> Trained:
    return run(Topology.virtual(1, 1))


@pytest.mark.parametrize(
    ("nodes", "per_node", "options"),
    [(1, 2, {"tp": 2, "sequence": True}), (2, 1, {"pp": 2}), (2, 2, {}), (2, 4, {"pp": 2, "tp": 2})],
)
def test_any_mesh_clips_as_one_process(
    nodes: int, per_node: int, options: dict[str, Any], alone: Trained
) -> None:
    found = run(Topology.virtual(nodes, per_node), **options).outcome.loss
    assert abs(found - alone.outcome.loss) <= error(alone.outcome.loss)


def test_control_unclipped_gradients_are_noticed(alone: Trained) -> None:
    found = run(Topology.virtual(1, 1), clip=0.0).outcome.loss
    assert abs(found - alone.outcome.loss) > error(alone.outcome.loss)


def test_control_the_norm_of_a_part_is_noticed(alone: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(replica: Replica) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in replica.parameters() if p.grad is not None])

    monkeypatch.setattr(Replica, "gradient_norm", part)
    found = run(Topology.virtual(1, 2), pp=2).outcome.loss
    assert abs(found - alone.outcome.loss) > error(alone.outcome.loss)
