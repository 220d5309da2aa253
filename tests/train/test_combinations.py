"""What the table of combinations says works is run, pair by pair, on a tiny model; what it refuses is refused."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from hybridcomm.topology import Topology
from model.computing import Computing
from tests.numerics import UNIT_ROUNDOFF, gamma
from tests.repository.layout import ROOT
from tests.train.trained import DATA, MODEL, Trained, settings, train, trained
from train.backend_ddp import DDPBackend
from train.combinations import ALTERNATIVES, FEATURES, REFUSED, SPLIT_BACKWARD, features, table
from train.config import OptimConfig, TrainConfig
from train.pipeline import SCHEDULES, make_schedule

pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("combinations")]  # blocks are traced once

STEPS = 2
OPTIONS: dict[str, dict[str, Any]] = {
    "autocast": {"autocast": "bf16"},
    "checkpoint": {"checkpoint": True},
    "compile": {"compile": True},
    "zero": {"zero": 1},
    "compress": {"compress": "fp16"},
    "tp": {"tp": 2},
    "sequence": {"tp": 2, "sequence": True},
    "pp": {"pp": 2, "schedule": "1f1b"},
    "split": {"pp": 2, "schedule": "zbv"},
    "ddp": {"comm": "ddp"},
}
PAIRS = [frozenset(pair) for pair in combinations(FEATURES, 2)]
WORK = [pair for pair in PAIRS if pair not in REFUSED and pair != ALTERNATIVES]
SMOOTH = OptimConfig(lr=0.5, eps=1.0, warmup_steps=0)
"""Adam's epsilon is large beside the gradients, so their last bits stay last bits in the updates."""


def named(pair: frozenset[str]) -> str:
    return "+".join(name for name in FEATURES if name in pair)


def config_of(used: frozenset[str], **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {"max_steps": STEPS, "optim": SMOOTH, "microbatches": 3}
    for name in sorted(used):
        options |= OPTIONS[name]
    return settings(**options, outer="dp" if "compress" in used else "pp", **changes)


class Traced(TrainConfig):
    """Compiles by tracing alone: what there is to go wrong in a combination, without a compiler's minute."""

    @property
    def computing(self) -> Computing:
        found = super().computing
        return dataclasses.replace(found, compile="eager" if found.compile else None)


@cache
def run(used: frozenset[str]) -> list[Trained]:
    """By rank: two nodes where there is something to compress, two replicas in a node where state is shared."""
    config = Traced(**dict(config_of(used)))
    if "ddp" in used:
        backend = DDPBackend(config)
        try:
            return [train(backend, config)]
        finally:
            backend.close()
    per_node = config.pp * config.tp * (2 if config.zero else 1)
    return trained(Topology.virtual(2 if "compress" in used else 1, per_node), config, timeout=120.0)


def rounds(dtype_of_products: str) -> int:
    """Chained roundings through a forward pass: each block's products with their operands, norms and softmax."""
    terms = 1 if dtype_of_products == "bfloat16" else max(2 * MODEL.hidden, 3 * MODEL.dim)
    return MODEL.layers * (6 * (2 + terms) + 4) + 2 + terms


def loss_error(used: frozenset[str]) -> float:
    """How far a run's loss per prediction, in nats, may lie from that of one plain process.

    A prediction's loss moves by at most twice what a score does. Scores are products of normed states of length
    sqrt(dim) and rows of about sqrt(dim) init_std, doubled by text. Autocast rounds operands and products to bf16,
    compression means to fp16, which the rate of learning multiplies; all else are sums in other orders.
    """
    score = MODEL.dim * MODEL.init_std * 2
    error = STEPS * 2 * gamma(rounds("float32") + 40 + DATA.num_items, "float32")
    if "autocast" in used:
        error += gamma(rounds("bfloat16"), "bfloat16")
    if "compress" in used:
        error += STEPS * SMOOTH.lr * UNIT_ROUNDOFF["float16"]
    return 2 * score * error


@pytest.mark.parametrize("pair", WORK, ids=named)
def test_what_is_said_to_work_trains_as_one_plain_process(pair: frozenset[str]) -> None:
    (plain,) = run(frozenset())
    for one in run(pair):
        assert one.outcome.steps == STEPS
        assert abs(one.outcome.loss - plain.outcome.loss) <= loss_error(pair)
        assert one.outcome.test is not None
        assert plain.outcome.test is not None
        assert one.outcome.test.users == plain.outcome.test.users


@pytest.mark.parametrize("pair", [p for p in WORK if p & {"checkpoint", "zero"}], ids=named)
def test_checkpoints_and_shared_state_keep_every_bit(pair: frozenset[str]) -> None:
    """Of what the other of the two does."""
    name = "checkpoint" if "checkpoint" in pair else "zero"
    rest = pair - {name}
    if name == "checkpoint" and "zero" in pair:
        rest = (
            frozenset()
        )  # shared state needs two replicas, whose mean is another sum: compared with each other
        want: list[Trained] = run(frozenset({"zero"}))
    else:
        want = run(rest) if name == "checkpoint" else replicated(rest)
    for one, other in zip(run(pair), want, strict=True):
        assert one.outcome.loss == other.outcome.loss
        assert all(torch.equal(a, b) for a, b in zip(one.gradients, other.gradients, strict=True))
        assert all(torch.equal(value, other.weights[key]) for key, value in one.weights.items())


@cache
def replicated(used: frozenset[str]) -> list[Trained]:
    """Without shared state, on the topology that shared state would have."""
    config = Traced(**dict(config_of(used)))
    nodes = 2 if "compress" in used else 1
    return trained(Topology.virtual(nodes, 2 * config.pp * config.tp), config, timeout=120.0)


@pytest.mark.parametrize("name", ["autocast", "compress"])
def test_control_what_rounds_changes_the_loss(name: str) -> None:
    """Else the option would not act; and the bounds are below what another number of layers makes."""
    (plain,) = run(frozenset())
    (changed, *_) = run(frozenset({name}))
    assert 0 < abs(changed.outcome.loss - plain.outcome.loss) <= loss_error(frozenset({name}))


def test_control_another_model_is_outside_the_bound() -> None:
    (plain,) = run(frozenset())
    smaller = Traced(**dict(config_of(frozenset(), seed=1)))
    (other,) = trained(Topology.virtual(1, 1), smaller)
    assert abs(other.outcome.loss - plain.outcome.loss) > loss_error(frozenset())


@pytest.mark.parametrize("pair", list(REFUSED), ids=named)
def test_what_is_said_not_to_work_is_refused_with_the_reason(pair: frozenset[str]) -> None:
    with pytest.raises(ValidationError, match=re.escape(REFUSED[pair])):
        config_of(pair)


@pytest.mark.parametrize("pair", WORK, ids=named)
def test_configurations_use_what_they_are_made_for(pair: frozenset[str]) -> None:
    """So the runs above are of what the table means. Split tokens are always those of shared layers."""
    assert features(config_of(pair)) == pair | ({"tp"} if "sequence" in pair else set())


def test_the_documentation_prints_the_table() -> None:
    assert table() in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_split_backward_is_what_the_schedules_do() -> None:
    for name in SCHEDULES:
        entries = [entry for each in make_schedule(name, 2, 4).lists for entry in each]
        assert any(entry.op == "W" for entry in entries) is (name in SPLIT_BACKWARD), name
