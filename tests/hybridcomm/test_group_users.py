"""What stands on a context stands on a group: the reducer, the automatic policy, the module's functions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import hybridcomm
from hybridcomm.context import Context
from hybridcomm.reducer import Reducer
from tests.engine_ranks import engine_contexts
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def contexts() -> Iterator[list[Context]]:
    with engine_contexts(NAMED["3+2"]) as contexts:
        yield contexts


def gradient(rank: int, shape: torch.Size) -> torch.Tensor:
    return torch.full(shape, float(4 * rank))


def test_two_reducers_over_two_groups_side_by_side(contexts: list[Context]) -> None:
    """Data parallel in each of two groups, as beside a split model; backwards in turn, means of each group."""

    def body(ctx: Context) -> None:
        group = ctx.split(ctx.rank % 2)
        assert group is not None
        torch.manual_seed(0)
        model = torch.nn.Linear(300, 70)
        reducer = Reducer(model, ctx=group, compress=None)
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = None
            loss = sum((p * gradient(ctx.rank + step, p.shape)).sum() for p in model.parameters())
            torch.as_tensor(loss).backward()
            reducer.finalize()
            want = sum(4.0 * (rank + step) for rank in group.ranks) / len(group.ranks)
            for parameter in model.parameters():
                assert parameter.grad is not None
                assert torch.equal(parameter.grad, torch.full_like(parameter, want))

    # Members of 0, 2, 4 and of 1, 3: the means of 3 ranks are exact as well (their sum is a multiple of 3 x 4).
    run_ranks(body, contexts)


def test_auto_asks_the_policy_for_the_group_s_own_topology(contexts: list[Context]) -> None:
    def body(ctx: Context) -> None:
        group = ctx.group([0, 1])
        if group.is_member:
            t = np.full(50_000, ctx.rank + 1, np.float32)
            group.allreduce(t, compress="auto")
            assert (t == 3).all(), "one node: nothing to compress"

    run_ranks(body, contexts)


def test_functions_of_the_module_take_groups(contexts: list[Context]) -> None:
    def body(ctx: Context) -> None:
        pair = ctx.group([4, 1])
        if not pair.is_member:
            return
        t = np.full(10, pair.rank + 1.0)
        hybridcomm.allreduce(t, group=pair)
        hybridcomm.barrier(group=pair)
        assert (t == 3).all()
        got = np.empty(10)
        ops = [
            hybridcomm.P2POp(hybridcomm.irecv, got, 1 - pair.rank, pair, 7),
            hybridcomm.P2POp(hybridcomm.isend, t + pair.rank, 1 - pair.rank, pair, 7),
        ]
        for work in hybridcomm.batch_isend_irecv(ops):
            work.wait(20)
        assert (got == 3 + (1 - pair.rank)).all()
        if pair.rank == 0:
            hybridcomm.send(t, 1, 8, group=pair)
            hybridcomm.isend(t, 1, 9, group=pair).wait(20)
        else:
            assert hybridcomm.recv(got, 0, 8, group=pair) == 0
            hybridcomm.irecv(got, 0, 9, group=pair).wait(20)
        half = hybridcomm.split(0, -pair.rank, group=pair)
        assert half is not None
        assert half.ranks == (1, 4)
        shared = hybridcomm.empty(100, dtype="float32", group=pair)
        assert len(shared) == 100

    run_ranks(body, contexts)
