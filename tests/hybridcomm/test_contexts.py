"""Contexts do what the plan says: the interpreter's bits, for every topology, size and step, residual
included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hybridcomm import collective_plans as plans
from hybridcomm.errors import PlanMismatchError
from hybridcomm.residual import Residual
from hybridcomm.topology import Topology
from tests.conftest import MakeContexts
from tests.exact import exact_ints, exact_sum
from tests.hybridcomm.strategies import NAMED, topk
from tests.interpreter import Interpreter
from tests.ranks import run_ranks

SIZES = (1, 17, 1025, 40_009, 300_000)
CALLS = 3


def heavy_tailed(rank: int, numel: int, call: int) -> np.ndarray:
    return np.random.default_rng([rank, numel, call]).standard_t(2, numel).astype(np.float32)


def expected(topology: Topology, numel: int) -> list[list[np.ndarray]]:
    """Per call, what every rank ends with, by the interpreter; the residual is carried from call to call."""
    world, codec = topology.world_size, topk(0.05, 64)
    plan = plans.allreduce(topology, numel, op="mean", compressor=codec)
    residuals = [Residual() for _ in range(world)]
    out = []
    for call in range(CALLS):
        buffers = [heavy_tailed(rank, numel, call) for rank in range(world)]
        staged = {
            rank: residuals[rank].stage("tensor", numel=numel, regions=plan.residual_regions(rank))
            for rank in range(world)
            if plan.residual_regions(rank)
        }
        Interpreter(plan).run(buffers, staged)
        out.append(buffers)
    return out


@pytest.mark.parametrize("name", NAMED)
def test_compressed_allreduce_has_the_interpreters_bits(make_contexts: MakeContexts, name: str) -> None:
    topology = NAMED[name]

    def rank(ctx: Any) -> list[list[np.ndarray]]:
        out = []
        for numel in SIZES:
            residual = Residual()
            out.append([heavy_tailed(ctx.rank, numel, call) for call in range(CALLS)])
            for tensor in out[-1]:
                ctx.allreduce(tensor, op="mean", compress=topk(0.05, 64), residual=residual)
        return out

    results = run_ranks(rank, make_contexts(topology))
    for place, numel in enumerate(SIZES):
        want = expected(topology, numel)
        for rank_, result in enumerate(results):
            for call in range(CALLS):
                assert result[place][call].tobytes() == want[call][rank_].tobytes(), (numel, rank_, call)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_dense_allreduce_is_exact_also_when_issued_together(
    make_contexts: MakeContexts, name: str, dtype: str
) -> None:
    """All calls are in flight at once and waited for in reverse order."""
    topology = NAMED[name]
    world = topology.world_size

    def rank(ctx: Any) -> list[np.ndarray]:
        tensors = [
            exact_ints(rank=ctx.rank, numel=numel, world=world, call=call, dtype=dtype).astype(dtype)
            for call, numel in enumerate(SIZES)
        ]
        works = [ctx.allreduce(tensor, async_op=True) for tensor in tensors]
        for work in reversed(works):
            work.wait()
        return tensors

    for result in run_ranks(rank, make_contexts(topology)):
        for call, numel in enumerate(SIZES):
            want = exact_sum(numel=numel, world=world, call=call, dtype=dtype).astype(dtype)
            assert result[call].tobytes() == want.tobytes(), (numel, call)


def test_tensors_of_one_size_that_ranks_mix_up_are_an_error(make_contexts: MakeContexts) -> None:
    """Same size, same dtype: only the bucket number tells them apart."""

    def rank(ctx: Any) -> None:
        order = (0, 1) if ctx.rank % 2 else (1, 0)
        works = [
            ctx.allreduce(np.ones(64, np.float32), residual_key=f"bucket{bucket}", async_op=True)
            for bucket in order
        ]
        for work in works:
            work.wait()

    with pytest.raises(PlanMismatchError):
        run_ranks(rank, make_contexts(NAMED["2x2"]))


def test_nan_on_one_rank_reaches_all_and_leaves_the_residual(make_contexts: MakeContexts) -> None:
    def rank(ctx: Any) -> None:
        residual, numel = Residual(), 10_000
        tensor = heavy_tailed(ctx.rank, numel, 0)
        ctx.allreduce(tensor, op="mean", compress=topk(0.05, 64), residual=residual)
        residual.commit()
        before = residual.state_dict()
        bad = heavy_tailed(ctx.rank, numel, 1)
        if ctx.rank == 3:
            bad[4321] = np.inf
        ctx.allreduce(bad, op="mean", compress=topk(0.05, 64), residual=residual)
        assert np.isnan(bad[4321])
        residual.rollback()
        after = residual.state_dict()
        assert all(before[key].tobytes() == after[key].tobytes() for key in before)

    run_ranks(rank, make_contexts(NAMED["2x2"]))
