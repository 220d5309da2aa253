"""Optimizer steps commit and roll back the residual: hooks, scales, several optimizers, skips."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridcomm.errors import ResidualError, UnsupportedError
from hybridcomm.reducer import Reducer
from tests.conftest import MakeContexts
from tests.hybridcomm.exact_models import ExactNet
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks

SMALL_MB = 400 / (1 << 20)  # buckets of 100 floats: several for ExactNet


def train_once(ctx: Any, model: ExactNet, reducer: Reducer, step: int, *, bad: bool = False) -> None:
    model.zero_grad()
    loss = model.loss(ctx.rank, step)
    (loss * float("inf") if bad and ctx.rank == 1 else loss).backward()
    reducer.finalize()


@pytest.mark.parametrize("how", ["attach", "manual"])
def test_steps_commit_and_silence_raises(make_contexts: MakeContexts, how: str) -> None:
    def rank(ctx: Any) -> None:
        model = ExactNet()
        reducer = Reducer(model, ctx=ctx, compress="topk:0.25/b64", bucket_cap_mb=SMALL_MB)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        if how == "attach":
            reducer.attach(optimizer)
        for step in range(3):
            train_once(ctx, model, reducer, step)
            assert reducer.residual.pending
            if how == "attach":
                optimizer.step()
            else:
                reducer.commit()
            assert not reducer.residual.pending
        train_once(ctx, model, reducer, 3)
        with pytest.raises(
            ResidualError, match=r"rollback\(\) if you skipped it, or use no_sync\(\) to accumulate"
        ):
            train_once(ctx, model, reducer, 4)
        reducer.rollback()
        train_once(ctx, model, reducer, 4)
        assert reducer.stats().applied == 3

    run_ranks(rank, make_contexts(NAMED["2x2"]))


def test_a_step_that_is_not_finite_rolls_back_by_itself(make_contexts: MakeContexts) -> None:
    """One rank's Inf reaches every rank as NaN, all skip, and the next backward finds the old residual."""

    def rank(ctx: Any) -> None:
        model = ExactNet()
        reducer = Reducer(model, ctx=ctx, compress="topk:0.25/b64", bucket_cap_mb=SMALL_MB)
        reducer.attach(torch.optim.SGD(model.parameters(), lr=0.0))
        train_once(ctx, model, reducer, 0)
        reducer.commit()
        before = reducer.residual.state_dict()
        train_once(ctx, model, reducer, 1, bad=True)
        assert not all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())  # type: ignore[arg-type]
        train_once(ctx, model, reducer, 2)
        reducer.rollback()
        after = reducer.residual.state_dict()
        assert before.keys() == after.keys()
        assert all((before[key] == after[key]).all() for key in before)
        assert reducer.stats().skipped == 2

    run_ranks(rank, make_contexts(NAMED["2x2"]))


def test_fused_optimizer_that_skips_inside_rolls_back(make_contexts: MakeContexts) -> None:
    """Fused optimizers are called even when the scaler found Inf: their hook must not commit."""

    def rank(ctx: Any) -> None:
        model = ExactNet()
        reducer = Reducer(model, ctx=ctx, compress="topk:0.25/b64", bucket_cap_mb=SMALL_MB)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        reducer.attach(optimizer, scaler=scaler)
        for step, bad in ((0, False), (1, True), (2, False)):
            model.zero_grad()
            loss = model.loss(ctx.rank, step)
            scaler.scale(loss * float("inf") if bad and ctx.rank == 1 else loss).backward()
            reducer.finalize()
            scaler.step(optimizer)
            scaler.update()
        assert (reducer.stats().applied, reducer.stats().skipped) == (2, 1)

    run_ranks(rank, make_contexts(NAMED["2x2"]))


def test_several_optimizers_commit_when_all_have_stepped(make_contexts: MakeContexts) -> None:
    def rank(ctx: Any) -> None:
        model = ExactNet()
        reducer = Reducer(model, ctx=ctx, compress="topk:0.25/b64", bucket_cap_mb=SMALL_MB)
        first = torch.optim.SGD(model.first.parameters(), lr=0.0)
        rest = torch.optim.SGD([*model.embed.parameters(), *model.second.parameters()], lr=0.0)
        reducer.attach(first)
        reducer.attach(rest)
        train_once(ctx, model, reducer, 0)
        first.step()
        assert reducer.residual.pending
        with pytest.raises(ResidualError, match="1 of 2 attached optimizers"):
            train_once(ctx, model, reducer, 1)
        rest.step()
        assert not reducer.residual.pending

    run_ranks(rank, make_contexts(NAMED["2x2"]))


def test_loss_scale_must_be_a_power_of_two(make_contexts: MakeContexts) -> None:
    def rank(ctx: Any) -> None:
        model = ExactNet()
        reducer = Reducer(model, ctx=ctx, compress="topk")
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
        reducer.attach(torch.optim.SGD(model.parameters(), lr=0.0), scaler=scaler)
        with pytest.raises(UnsupportedError, match="no power of two"):
            scaler.scale(model.loss(ctx.rank, 0)).backward()

    run_ranks(rank, make_contexts(NAMED["2x2"]))
