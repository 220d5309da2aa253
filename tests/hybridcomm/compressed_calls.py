"""Compressed all-reduces by the engine and by the interpreter, and what their residuals hold."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridcomm.compress import ByLink
from hybridcomm.context import Context
from hybridcomm.groups import Grouping
from hybridcomm.plan import RESIDUALS, Plan
from hybridcomm.residual import Residual
from tests.engine_ranks import each_rank
from tests.interpreter import Interpreter

__all__ = [
    "CODEC",
    "Arrays",
    "Oracle",
    "by_engine",
    "gradients",
    "held_back",
    "next_call",
    "residual_numel",
    "residual_of",
]

CODEC = "topk:0.1/b64"
_OPS = ["", *RESIDUALS[1:]]
Arrays = list[np.ndarray[Any, Any]]


def gradients(world: int, numel: int, seed: int) -> Arrays:
    """Heavy-tailed, different per rank and call, with zeros, ties and subnormals among them."""
    dice = np.random.default_rng(seed)
    out = []
    for _ in range(world):
        values = dice.standard_t(2, numel).astype(np.float32)
        values[dice.random(numel) < 0.1] = 0.0
        values[dice.random(numel) < 0.05] = 1.5
        values[dice.random(numel) < 0.05] = 1e-41
        out.append(values)
    return out


def by_engine(
    contexts: Sequence[Grouping],
    inputs: Arrays,
    *,
    op: str = "mean",
    compress: ByLink = CODEC,
    residuals: list[Residual] | None = None,
    exchange: str = "auto",
    jitter: int | None = None,
) -> Arrays:
    def body(rank: int) -> np.ndarray[Any, Any]:
        value = inputs[rank].copy()
        if jitter is not None:
            time.sleep(random.Random(100 * jitter + rank).uniform(0, 0.02))
        residual = residuals[rank] if residuals else None
        contexts[rank].allreduce(value, op=op, compress=compress, residual=residual, exchange=exchange)
        return value

    results = each_rank(body, len(contexts))
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


class Oracle:
    """The same calls by the interpreter, which keeps each rank's residual as one array."""

    def __init__(self) -> None:
        self.residuals: dict[int, np.ndarray[Any, Any]] | None = None

    def run(self, plan: Plan, inputs: Arrays, *, with_residual: bool = True, **call: Any) -> Arrays:
        """``call``: what an `Interpreter` takes."""
        buffers = [values.copy() for values in inputs]
        if not with_residual:
            Interpreter(plan, **call).run(buffers)
            return buffers
        world = range(plan.topology.world_size)
        sizes = {rank: residual_numel(plan, rank) for rank in world}
        before = self.residuals or {rank: np.zeros(sizes[rank], np.float32) for rank in world}
        after = {rank: np.zeros(sizes[rank], np.float32) for rank in world}
        Interpreter(plan, **call).run(buffers, {rank: (before[rank], after[rank]) for rank in world})
        self.residuals = after
        return buffers

    def check_steps(
        self,
        contexts: Sequence[Grouping],
        plan: Plan,
        steps: Sequence[Arrays],
        first_call: int = 1,
        digest: int | None = None,
        **call: Any,
    ) -> None:
        """The engine's means are the interpreter's bytes in all ``steps``, and so are the residuals after them.

        ``first_call``, ``digest``: see `Interpreter`; ``call``: what `by_engine` takes.
        """
        residuals = [Residual() for _ in contexts]
        for step, inputs in enumerate(steps):
            want = self.run(plan, inputs, call=first_call + step, digest=digest)
            got = by_engine(contexts, inputs, residuals=residuals, **call)
            assert [a.tobytes() for a in got] == [b.tobytes() for b in want], step
            assert len({a.tobytes() for a in got}) == 1, step
            for residual in residuals:
                residual.commit()
        self.check_residuals(residuals)

    def check_residuals(self, residuals: Sequence[Residual]) -> None:
        """Those of the engine's ranks are the interpreter's, byte for byte."""
        assert self.residuals is not None
        assert len(self.residuals) == len(residuals)
        for rank, residual in enumerate(residuals):
            assert residual_of(residual).tobytes() == self.residuals[rank].tobytes(), rank


def next_call(contexts: Sequence[Context]) -> int:
    """The number that the next collective of all ranks has."""
    return contexts[0].counters()["calls"] + 1


def residual_numel(plan: Plan, rank: int) -> int:
    """Elements of a rank's residual, of all ops."""
    return sum(region.numel for regions in plan.residuals(rank).values() for region in regions)


def residual_of(residual: Residual) -> np.ndarray[Any, Any]:
    """A rank's committed residual of one tensor, in the order of the interpreter's."""
    state = residual.state_dict()
    keys = sorted(state, key=lambda key: (_OPS.index(key.rpartition("]")[2].strip()), _begin(key)))
    return np.concatenate([state[key] for key in keys]) if keys else np.zeros(0, np.float32)


def held_back(residuals: list[Residual], numel: int) -> np.ndarray[Any, Any]:
    """The sum of all residuals, velocities aside, by element; float64."""
    total = np.zeros(numel)
    for residual in residuals:
        for key, values in residual.state_dict().items():
            if ":velocity[" in key:
                continue
            begin = _begin(key)
            total[begin : begin + len(values)] += values
    return total


def _begin(key: str) -> int:
    return int(key.rpartition("[")[2].partition(":")[0])
