"""Programs: what a send reads is not written before it has gone, whichever operation would."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from hybridcomm import _C, lower
from hybridcomm.compress import resolve
from hybridcomm.plan import Plan, Step
from tests.hybridcomm.strategies import NAMED, every_plan

Kind = _C.Kind
WRITERS = (Kind.reduce, Kind.sum, Kind.decode, Kind.get, Kind.collect)


@dataclass(frozen=True, kw_only=True)
class Op:
    kind: Any
    begin: int
    end: int
    in_scratch: bool
    after: frozenset[int]

    @property
    def writes(self) -> bool:
        return self.kind in WRITERS or (self.kind == Kind.receive and not self.in_scratch)


def lowered(plan: Plan, rank: int, patch: pytest.MonkeyPatch) -> list[Op]:
    """The operations of ``rank``; each with all those that it waits for, directly or through others."""
    ops: list[Op] = []
    original = lower._Lowering._add

    def add(
        self: Any, kind: Any, stream: Hashable, step: Step, *, after: Iterable[int] = (), **options: Any
    ) -> int:
        after = list(after)
        behind = frozenset(after).union(*(ops[i].after for i in after))
        scratch = options.get("in_scratch", False)
        ops.append(
            Op(kind=kind, begin=step.region.begin, end=step.region.end, in_scratch=scratch, after=behind)
        )
        return original(self, kind, stream, step, after=after, **options)

    with patch.context() as context:
        context.setattr(lower._Lowering, "_add", add)
        lower.lower(plan, rank, resolve(plan.compressor), resolve(plan.intra_compressor))
    return ops


def overtaken(ops: list[Op]) -> list[tuple[int, int]]:
    """(send, operation that overwrites what it sends without having waited for it)."""
    found = []
    for i, send in enumerate(ops):
        if send.kind != Kind.send or send.in_scratch:
            continue
        for j in range(i + 1, len(ops)):
            op = ops[j]
            if op.writes and op.begin < send.end and send.begin < op.end and i not in op.after:
                found.append((i, j))
    return found


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("numel", [1, 1000, 9000])
def test_nothing_overwrites_what_is_still_being_sent(
    monkeypatch: pytest.MonkeyPatch, name: str, numel: int
) -> None:
    for plan in every_plan(NAMED[name], numel):
        if plan.collective == "monitored_barrier":
            continue  # rank 0 sends back what has come: it cannot overtake it
        for rank in range(plan.topology.world_size):
            assert overtaken(lowered(plan, rank, monkeypatch)) == [], plan.collective


def test_control_a_sum_that_does_not_wait_for_the_sends_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = lower._Lowering._receive_and_sum
    monkeypatch.setattr(
        lower._Lowering,
        "_receive_and_sum",
        lambda self, step, nbytes, _: original(self, step, nbytes, self._after(step)),
    )
    plan = every_plan(NAMED["2x2"], 9000)[0]
    assert overtaken(lowered(plan, 0, monkeypatch))
