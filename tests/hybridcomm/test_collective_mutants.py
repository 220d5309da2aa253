"""Planted bugs in plans, memory and lowering: the checks of `test_collectives` must catch each, on every collective."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hybridcomm import _C, collective_plans, lower
from hybridcomm.context import Context
from hybridcomm.memory import Memory
from hybridcomm.plan import Plan
from tests.engine_ranks import each_rank, engine_contexts
from tests.exact import exact_ints, exact_sum
from tests.hybridcomm.strategies import NAMED

NUMEL = 20_000
Patch = Callable[[pytest.MonkeyPatch], None]


def value(rank: int, numel: int = NUMEL, call: int = 0) -> np.ndarray[Any, Any]:
    return exact_ints(rank=rank, numel=numel, world=4, call=call).astype(np.float32)


def total(numel: int = NUMEL, call: int = 0) -> np.ndarray[Any, Any]:
    return exact_sum(numel=numel, world=4, call=call).astype(np.float32)


def reduce(ctx: Context) -> bool:
    array = value(ctx.rank)
    ctx.reduce(array, 1)
    return bool((array == (total() if ctx.rank == 1 else value(ctx.rank))).all())


def reduce_scatter(ctx: Context) -> bool:
    whole, out = value(ctx.rank, 4 * NUMEL), np.zeros(NUMEL, np.float32)
    ctx.reduce_scatter_tensor(out, whole)
    good = out == total(4 * NUMEL)[ctx.rank * NUMEL : (ctx.rank + 1) * NUMEL]
    return bool(good.all() and (whole == value(ctx.rank, 4 * NUMEL)).all())


def all_gather(ctx: Context) -> bool:
    out = [np.zeros(NUMEL, np.float32) for _ in range(4)]
    ctx.all_gather(out, value(ctx.rank))
    return all((got == value(rank)).all() for rank, got in enumerate(out))


def gather(ctx: Context) -> bool:
    out = [np.zeros(NUMEL, np.float32) for _ in range(4)] if ctx.rank == 2 else None
    ctx.gather(value(ctx.rank), out, 2)
    return all((got == value(rank)).all() for rank, got in enumerate(out or []))


def scatter(ctx: Context) -> bool:
    out = np.zeros(NUMEL, np.float32)
    ctx.scatter(out, [value(rank) for rank in range(4)] if ctx.rank == 2 else None, 2)
    return bool((out == value(ctx.rank)).all())


def all_to_all(ctx: Context) -> bool:
    out = np.zeros(4 * NUMEL, np.float32)
    ctx.all_to_all_single(out, np.concatenate([value(ctx.rank, call=j) for j in range(4)]))
    return bool((out == np.concatenate([value(i, call=ctx.rank) for i in range(4)])).all())


CHECKS = {each.__name__: each for each in (reduce, reduce_scatter, all_gather, gather, scatter, all_to_all)}


def change_plan(name: str, change: Callable[[Plan], Plan]) -> Patch:
    def apply(patch: pytest.MonkeyPatch) -> None:
        original = getattr(collective_plans, name)
        patch.setattr(collective_plans, name, lambda *a, **k: change(original(*a, **k)))

    return apply


def forget_last(plan: Plan) -> Plan:
    return dataclasses.replace(plan, steps=plan.steps[:-1])


def turn_last(plan: Plan) -> Plan:
    last = plan.steps[-1]
    other = next(rank for rank in last.group if rank != last.root)
    return dataclasses.replace(plan, steps=(*plan.steps[:-1], dataclasses.replace(last, root=other)))


def change_op(kind: str, **fields: Any) -> Patch:
    def apply(patch: pytest.MonkeyPatch) -> None:
        original = lower._Lowering._add

        def add(self: Any, kind_: Any, stream: Any, step: Any, **options: Any) -> int:
            return original(
                self, kind_, stream, step, **options | (fields if kind_ == getattr(_C.Kind, kind) else {})
            )

        patch.setattr(lower._Lowering, "_add", add)

    return apply


def no(method: str) -> Patch:
    return lambda patch: patch.setattr(Memory, method, lambda *_: None)


BUGS: dict[tuple[str, str], Patch] = {
    **{(name, "the last step forgotten"): change_plan(name, forget_last) for name in CHECKS},
    **{(name, "the last step turned around"): change_plan(name, turn_last) for name in CHECKS},
    **{(name, "own part not copied"): no("copy") for name in CHECKS if name != "reduce"},
    ("reduce", "partial sums in inputs"): no("shield"),
    ("reduce_scatter", "partial sums in inputs"): no("shield"),
    ("reduce", "sums sent before they are there"): change_op("send", after=()),
    ("reduce", "handed over before they are there"): change_op("publish", after=(), deliver=False),
}


@pytest.mark.parametrize("name", CHECKS)
def test_control(name: str) -> None:
    assert outcome(name) == [True] * 4


@pytest.mark.parametrize(("name", "bug"), BUGS)
def test_planted_bugs_are_caught(monkeypatch: pytest.MonkeyPatch, name: str, bug: str) -> None:
    BUGS[name, bug](monkeypatch)
    assert outcome(name) != [True] * 4


def outcome(name: str) -> list[Any]:
    """Each rank's verdict on several calls, the last to come being another rank each time; or its error."""
    with engine_contexts(NAMED["2x2"], timeout=1.0, chunk_nbytes=16384) as contexts:

        def body(rank: int) -> bool:
            verdicts = [CHECKS[name](contexts[rank]) for _ in range(3)]  # no rank leaves before the others
            return all(verdicts)

        return each_rank(body, 4)
