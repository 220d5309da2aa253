"""Decayed and momentum-corrected error feedback on the engine, against numpy over many steps; and their laws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from hybridcomm import collective_plans as plans
from hybridcomm.bucket import Span
from hybridcomm.compress import Compressor, resolve
from hybridcomm.errors import ResidualError, UnsupportedError
from hybridcomm.kernels import reference
from hybridcomm.residual import Residual
from hybridcomm.topology import Topology
from tests.engine_ranks import engine_contexts
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks

Array = np.ndarray[Any, Any]
NUMEL, STEPS = 700, 14
CODEC = "topk:0.05/b64"
SETTINGS: list[dict[str, Any]] = [
    {"decay": 0.9},
    {"momentum": 0.9},
    {"momentum": 0.5, "masking": False},
    {"decay": 0.75, "momentum": 0.9},
]


def gradient(rank: int, call: int) -> Array:
    values = np.random.default_rng([rank, call]).standard_t(3, NUMEL).astype(np.float32)
    if call == 6 and rank == 1:
        values[3] = np.inf
    return values


def calls() -> Iterator[tuple[int, str]]:
    """(call, what follows it): two calls in one step, a skipped step, and one that is not finite and rolled back."""
    for call in range(STEPS):
        yield call, {2: "nothing", 4: "rollback", 6: "rollback"}.get(call, "commit")


@dataclass
class Oracle:
    """One job in numpy. ``breaks``: the planted bug."""

    topology: Topology
    decay: float = 1.0
    momentum: float = 0.0
    masking: bool = True
    breaks: str = ""
    state: dict[int, tuple[Array, Array]] = field(default_factory=dict)
    committed: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        codec = resolve(CODEC)
        assert isinstance(codec, Compressor)
        self.spec: Any = codec.spec
        plan = plans.allreduce(self.topology, NUMEL, op="mean", compressor=codec)
        self.regions = [slice(*step.region) for step in plan.steps if step.op == "exchange_payload"]
        for node in range(len(self.topology.nodes)):
            self.state[node] = self.committed[node] = np.zeros(NUMEL, np.float32), np.zeros(NUMEL, np.float32)

    def call(self, number: int) -> Array:
        out, encoded = np.zeros(NUMEL, np.float32), {}
        for node, ranks in enumerate(self.topology.nodes):
            grad = gradient(ranks[0], number)
            for rank in ranks[1:]:
                grad = grad + gradient(rank, number)
            left, velocity = (array.copy() for array in self.state[node])
            for part in self.regions:
                encoded[node, part.start] = self._encode(grad[part], left[part], velocity[part])
            self.state[node] = left, velocity
        for part in self.regions:
            payloads = [encoded[node, part.start] for node in range(len(self.topology.nodes))]
            reference.decode_add(
                self.spec, payloads, out[part], float(np.float32(1 / self.topology.world_size))
            )
        return out

    def _encode(self, grad: Array, left: Array, velocity: Array) -> Array:
        with np.errstate(invalid="ignore"):
            moved = np.float32(self.momentum) * velocity + grad if self.momentum else grad
        payload, before = np.zeros(self.spec.nbytes(grad.size), np.uint8), left.copy()
        decay = 1.0 if self.breaks == "decay" else self.decay
        flags = reference.encode(self.spec, moved, before, left, payload, decay=decay)
        if not flags:
            velocity[:] = moved
            if self.masking and self.breaks != "masking":
                velocity[left != reference.compensate(moved, before, decay)] = 0
        return payload

    def follow(self, what: str) -> None:
        if what == "commit" or (what == "rollback" and self.breaks == "rollback"):
            self.committed = dict(self.state)
        elif what == "rollback":
            self.state = dict(self.committed)


def by_engine(contexts: list[Any], **settings: Any) -> tuple[list[Array], list[dict[str, Array]]]:
    def rank(context: Any) -> tuple[list[Array], dict[str, Array]]:
        residual, out = Residual(**settings), []
        for call, what in calls():
            tensor = gradient(context.rank, call)
            context.allreduce(tensor, op="mean", compress=CODEC, residual=residual, async_op=call % 2 == 1)
            context.barrier()
            out.append(tensor)
            if what != "nothing":
                getattr(residual, what)()
        return out, residual.state_dict()

    results = run_ranks(rank, contexts)
    for outs, _ in results:
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(outs, results[0][0], strict=True))
    return results[0][0], [state for _, state in results]


def agrees(outs: list[Array], oracle: Oracle) -> bool:
    wants = []
    for call, what in calls():
        wants.append(oracle.call(call))
        oracle.follow(what)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(outs, wants, strict=True))


@pytest.mark.parametrize("name", ["2x2", "4x1", "2+1+1"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_engine_and_oracle_agree_bit_for_bit(name: str, settings: dict[str, Any]) -> None:
    with engine_contexts(NAMED[name]) as contexts:
        outs, states = by_engine(contexts, **settings)
    oracle = Oracle(NAMED[name], **settings)
    assert agrees(outs, oracle)
    total = {part: np.zeros(NUMEL) for part in ("tensor", "tensor:velocity")}
    for state in states:
        for key, values in state.items():
            part, _, edges = key.rstrip("]").partition("[")
            begin, end = map(int, edges.split(":"))
            total[part][begin:end] += values
    want = [sum(pair[half].astype(float) for pair in oracle.state.values()) for half in (0, 1)]
    assert np.array_equal(total["tensor"], want[0])
    assert np.array_equal(total["tensor:velocity"], want[1] if oracle.momentum else np.zeros(NUMEL))
    assert np.isnan(outs[6][3])


@pytest.mark.parametrize("breaks", ["masking", "decay", "rollback"])
def test_the_oracle_would_notice(breaks: str) -> None:
    with engine_contexts(NAMED["2x2"]) as contexts:
        outs, _ = by_engine(contexts, decay=0.75, momentum=0.9)
    assert not agrees(outs, Oracle(NAMED["2x2"], decay=0.75, momentum=0.9, breaks=breaks))


def test_a_call_that_is_not_finite_leaves_residual_and_velocity() -> None:
    """Without a rollback: whoever sent the flag has both as they were."""

    def rank(context: Any) -> tuple[dict[str, Array], dict[str, Array]]:
        residual = Residual(momentum=0.9)
        for call in (0, 1):
            context.allreduce(gradient(context.rank, call), compress=CODEC, residual=residual)
        residual.commit()
        before = residual.state_dict()
        context.allreduce(np.full(NUMEL, np.nan, np.float32), compress=CODEC, residual=residual)
        context.allreduce(np.full(NUMEL, np.nan, np.float32), compress=CODEC, residual=residual)
        residual.commit()
        return before, residual.state_dict()

    with engine_contexts(NAMED["2x2"]) as contexts:
        for before, after in run_ranks(rank, contexts):
            assert all(np.array_equal(before[key], after[key]) for key in before)
            assert any(np.abs(values).sum() > 0 for key, values in before.items() if ":velocity" in key)


def test_the_law_of_decay() -> None:
    """Sum of d^(T - t) (gradient - W * update) = residual: exact, as d = 1/2 and values are small integers."""
    topology, decay, steps = NAMED["2x2"], 0.5, 4

    def integers(rank: int, step: int) -> Array:
        return np.random.default_rng([rank, step, 9]).integers(-8, 9, NUMEL).astype(np.float32)

    def rank(context: Any) -> tuple[list[Array], dict[str, Array]]:
        residual, out = Residual(decay=decay), []
        for step in range(steps):
            tensor = integers(context.rank, step)
            context.allreduce(tensor, compress="topk:0.05/b64", residual=residual)
            residual.commit()
            out.append(tensor)
        return out, residual.state_dict()

    with engine_contexts(topology) as contexts:
        results = run_ranks(rank, contexts)
    weighted, plain = np.zeros(NUMEL), np.zeros(NUMEL)
    for step in range(steps):
        gap = sum(integers(r, step).astype(float) for r in range(4)) - results[0][0][step]
        weighted += decay ** (steps - 1 - step) * gap
        plain += gap
    left = np.zeros(NUMEL)
    for _, state in results:
        for key, values in state.items():
            begin, end = map(int, key.partition("[")[2].rstrip("]").split(":"))
            left[begin:end] += values
    assert np.array_equal(weighted, left)
    assert not np.array_equal(plain, left), "without weights it must not hold"


def test_states_hold_the_velocity_and_refuse_another_kind() -> None:
    spans = (Span("a", 0, 30), Span("b", 30, 64))
    place: dict[str, Any] = {"numel": 64, "regions": [(16, 64)], "spans": spans}
    residual = Residual(momentum=0.5)
    staged = residual.prepare("bucket", **place)
    assert staged.velocity is not None
    staged.e_out[:], staged.velocity[1][:] = 1, np.arange(48)
    assert residual.nbytes == 2 * 2 * 48 * 4
    residual.commit()
    state = residual.state_dict()
    assert sorted(state) == ["a:velocity[16:30]", "a[16:30]", "b:velocity[0:34]", "b[0:34]"]
    again = Residual(momentum=0.5)
    again.load_state_dict(state)
    velocity = again.prepare("other bucket", **place).velocity
    assert velocity is not None
    assert np.array_equal(velocity[0], np.arange(48))
    assert not again.unclaimed
    plain = Residual()
    plain.load_state_dict(state)
    plain.prepare("bucket", **place)
    assert plain.unclaimed == ("a:velocity", "b:velocity")
    fresh = Residual(momentum=0.5)
    fresh.load_state_dict({key: values for key, values in state.items() if "velocity" not in key})
    with pytest.raises(ResidualError, match="'a:velocity'"):
        fresh.prepare("bucket", **place)


def test_momentum_needs_a_sparse_codec_or_no_masking() -> None:
    def rank(context: Any) -> None:
        tensor = gradient(context.rank, 0)
        with pytest.raises(UnsupportedError, match=r"int8.* sends something of every element"):
            context.allreduce(tensor, compress="int8", residual=Residual(momentum=0.9))
        context.allreduce(tensor, compress="int8", residual=Residual(momentum=0.9, masking=False))
        context.allreduce(tensor, compress="int8", residual=Residual(decay=0.9))

    with engine_contexts(Topology.virtual(2, 1)) as contexts:
        run_ranks(rank, contexts)


@pytest.mark.parametrize("settings", [{"decay": 0}, {"decay": 1.5}, {"momentum": 1.0}, {"momentum": -0.1}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(settings))):
        Residual(**settings)
