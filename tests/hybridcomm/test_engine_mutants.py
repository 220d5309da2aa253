"""Planted bugs: each must be caught by the checks that the engine's tests make (equality, the law, an error)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hybridcomm import _C, collective_plans, lower
from hybridcomm.context import Context
from hybridcomm.plan import Plan
from hybridcomm.residual import Residual
from tests.engine_ranks import each_rank, engine_contexts
from tests.exact import exact_ints, exact_sum
from tests.hybridcomm.strategies import NAMED
from tests.interpreter import Interpreter

NUMEL, CALLS = 60_000, 3
CODEC = "topk:0.1/b64"
Patch = Callable[[pytest.MonkeyPatch], None]


def mutate_op(kind: str, change: Callable[[dict[str, Any]], None]) -> Patch:
    """Changes the arguments of every operation of one kind, on all ranks."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        original = lower._Lowering._add

        def add(self: Any, kind_: Any, stream: Any, step: Any, **options: Any) -> int:
            if kind_ == getattr(_C.Kind, kind):
                change(options)
            return original(self, kind_, stream, step, **options)

        patch.setattr(lower._Lowering, "_add", add)

    return apply


def mutate_plan(change: Callable[[Plan], Plan]) -> Patch:
    def apply(patch: pytest.MonkeyPatch) -> None:
        original = collective_plans.allreduce
        patch.setattr(collective_plans, "allreduce", lambda *a, **k: change(original(*a, **k)))

    return apply


def swap_owners(plan: Plan) -> Plan:
    """Slices come back from the rank that did not sum them."""
    steps = list(plan.steps)
    for i, step in enumerate(steps):
        if step.op == "exchange_gather":
            other = step.group[(step.group.index(step.root) + 1) % len(step.group)]
            steps[i] = dataclasses.replace(step, root=other)
    return dataclasses.replace(plan, steps=tuple(steps))


def skip_last_chunk(plan: Plan) -> Plan:
    last = max(step.region[1] for step in plan.steps)
    return dataclasses.replace(plan, steps=tuple(s for s in plan.steps if s.region[1] != last))


DENSE: dict[str, Patch] = {
    "sum before the data has come": mutate_op("sum", lambda o: o.update(after=())),
    "sum reads beside its buffer": mutate_op(
        "sum", lambda o: o.update(sources=[s if s < 0 else s + 64 for s in o["sources"]])
    ),
    "sum forgets its own region": mutate_op("sum", lambda o: o.update(sources=o["sources"][-1:])),
    "mean divides twice": mutate_op("sum", lambda o: o.update(divisor=o["divisor"] ** 2)),
    "mean does not divide": mutate_op("sum", lambda o: o.update(divisor=1)),
    "send before the sum": mutate_op("send", lambda o: o.update(after=())),
    "publish before the data is complete": mutate_op("publish", lambda o: o.update(after=())),
    "owners swapped": mutate_plan(swap_owners),
    "the last chunk forgotten": mutate_plan(skip_last_chunk),
    "put into another rank's lane": mutate_op("put", lambda o: o.update(peer=0)),
}
SWAPPED = (
    "sum before the data has come",
    "sum forgets its own region",
    "mean divides twice",
    "send before the sum",
)
"""Also on two nodes, whose exchange is another one."""

COMPRESSED: dict[str, Patch] = {
    "all chunks share one residual": mutate_op("encode", lambda o: o.update(residual=0)),
    "weight of the mean forgotten": mutate_op("decode", lambda o: o.update(divisor=1)),
    "own payload counted twice": mutate_op("decode", lambda o: o.update(sources=[o["sources"][0]] * 2)),
    "payload sent before it is made": mutate_op("send", lambda o: o.update(after=())),
    "decoded before it has come": mutate_op("decode", lambda o: o.update(after=())),
}


def dense_check(contexts: list[Context]) -> bool:
    """Whether all ranks got the exact mean on all calls; ranks come at different times."""
    world = len(contexts)

    def body(rank: int) -> bool:
        good = True
        for call in range(CALLS):
            time.sleep(0.02 * ((rank + call) % world))
            ints = exact_ints(rank=rank, numel=NUMEL, world=world * world, call=call)
            array = (ints * world).astype(np.float32)
            contexts[rank].allreduce(array, op="mean")
            parts = [exact_ints(rank=r, numel=NUMEL, world=world * world, call=call) for r in range(world)]
            good &= array.tobytes() == np.sum(parts, axis=0).astype(np.float32).tobytes()
        return good

    return each_rank(body, world) == [True] * world


def compressed_check(contexts: list[Context]) -> bool:
    """Whether all ranks got the interpreter's bytes over steps with error feedback."""
    world = len(contexts)
    plan = contexts[0].plan_allreduce(NUMEL, op="mean", compress=CODEC)
    sizes = [sum(r.numel for r in plan.residual_regions(rank)) for rank in range(world)]
    held = [np.zeros(size, np.float32) for size in sizes]
    residuals = [Residual() for _ in range(world)]
    good = True
    for call in range(CALLS):
        dice = np.random.default_rng(call)
        inputs = [dice.standard_normal(NUMEL).astype(np.float32) for _ in range(world)]
        want = [values.copy() for values in inputs]
        after = [np.zeros(size, np.float32) for size in sizes]
        Interpreter(plan).run(want, dict(enumerate(zip(held, after, strict=True))))
        held = after

        def body(rank: int, inputs: list[Any] = inputs, want: list[Any] = want, call: int = call) -> bool:
            time.sleep(0.02 * ((rank + call) % world))
            array = inputs[rank].copy()
            contexts[rank].allreduce(array, op="mean", compress=CODEC, residual=residuals[rank])
            residuals[rank].commit()
            return bool(array.tobytes() == want[rank].tobytes())

        good &= each_rank(body, world) == [True] * world
    return good


@pytest.mark.parametrize(
    ("name", "what"),
    [*(("2+1+1", what) for what in (None, *DENSE)), *(("2x2", what) for what in (None, *SWAPPED))],
)
def test_dense_mutants_are_caught(monkeypatch: pytest.MonkeyPatch, name: str, what: str | None) -> None:
    if what is not None:
        DENSE[what](monkeypatch)
    with engine_contexts(NAMED[name], timeout=1.0, chunk_nbytes=16384) as contexts:
        assert dense_check(contexts) is (what is None)


@pytest.mark.parametrize("what", [None, *COMPRESSED])
def test_compressed_mutants_are_caught(monkeypatch: pytest.MonkeyPatch, what: str | None) -> None:
    if what is not None:
        COMPRESSED[what](monkeypatch)
    with engine_contexts(NAMED["3+2"], timeout=1.0, chunk_nbytes=16384) as contexts:
        assert compressed_check(contexts) is (what is None)


def test_sums_of_the_checks_are_exact() -> None:
    """The oracle of `dense_check` does not itself round."""
    parts = [exact_ints(rank=r, numel=NUMEL, world=16, call=1) for r in range(16)]
    assert (np.sum(parts, axis=0) == exact_sum(numel=NUMEL, world=16, call=1)).all()
