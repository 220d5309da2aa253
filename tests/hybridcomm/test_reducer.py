"""Hooks, launch order, no_sync, unused and shared parameters, misuse, reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hybridcomm.bucket import BucketState
from hybridcomm.errors import (
    DataTypeError,
    HybridCommError,
    PlanMismatchError,
    UnsupportedError,
)
from hybridcomm.reducer import Reducer
from tests.conftest import MakeContexts
from tests.fake_context import make_fake_contexts
from tests.hybridcomm.exact_models import ExactNet, ternary_
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks

SMALL_MB = 400 / (1 << 20)  # buckets of 100 floats: several for ExactNet
LOSSLESS = "topk:1.0/b64"


def local_gradients(
    world: int, steps: list[int], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Mean over ranks of the gradients summed over ``steps``, computed in one process."""
    total: dict[str, torch.Tensor] = {}
    for rank in range(world):
        model = ExactNet(dtype)
        for step in steps:
            model.loss(rank, step).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            total[name] = total.get(name, torch.zeros_like(parameter)) + parameter.grad
    return {name: value / world for name, value in total.items()}


def assert_equal(model: nn.Module, want: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, want[name]), name


@pytest.mark.parametrize("name", ["1x1", "1x4", "2x2", "4x1", "2+1+1"])
@pytest.mark.parametrize("compress", [None, LOSSLESS])
def test_gradients_are_the_mean_over_ranks(
    make_contexts: MakeContexts, name: str, compress: str | None
) -> None:
    """Dense: equality (integers, a power of two of ranks). Compressed: the same bits on all ranks."""
    topology = NAMED[name]
    steps = 2

    def rank(ctx: Any) -> Any:
        model = ExactNet()
        reducer = Reducer(model, ctx=ctx, bucket_cap_mb=SMALL_MB, compress=compress)
        assert len(reducer.layouts) > 2
        out = []
        for step in range(steps):
            model.zero_grad()
            model.loss(ctx.rank, step).backward()
            reducer.finalize()
            out.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            reducer.commit()
        return out

    results = run_ranks(rank, make_contexts(topology))
    for step in range(steps):
        want = local_gradients(topology.world_size, [step])
        for result in results:
            assert all(torch.equal(result[step][n], results[0][step][n]) for n in want)
            if compress is None:
                assert all(torch.equal(result[step][n], want[n]) for n in want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_buckets_have_the_parameters_dtype(
    make_contexts: MakeContexts, dtype: torch.dtype
) -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Linear(4, 4, dtype=dtype)
            self.high = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.high(self.low(x.to(dtype)).float())

    def rank(ctx: Any) -> None:
        model = Tiny()
        ternary_(model)
        reducer = Reducer(model, ctx=ctx)
        assert {layout.dtype for layout in reducer.layouts} == {"float32", str(dtype).removeprefix("torch.")}
        model(torch.full((1, 4), float(ctx.rank))).sum().backward()
        reducer.finalize()
        assert model.high.bias.grad is not None
        assert torch.equal(model.high.bias.grad, torch.ones(4))
        weight = model.low.weight.grad
        assert weight is not None
        # d/dw of sum = (column sums of high) x input; the inputs' mean over 4 ranks is 1.5
        want = model.high.weight.detach().sum(0)[:, None] * torch.full((4,), 1.5)
        assert torch.equal(weight.float(), want)

    run_ranks(rank, make_contexts(NAMED["2x2"]))


def test_no_sync_accumulates_and_sends_nothing(make_contexts: MakeContexts) -> None:
    def rank(ctx: Any) -> Any:
        model = ExactNet()
        reducer = Reducer(model, ctx=ctx, bucket_cap_mb=SMALL_MB)
        wire = reducer.stats().total_wire_nbytes
        with reducer.no_sync():
            for step in (0, 1):
                model.loss(ctx.rank, step).backward()
            with pytest.raises(HybridCommError, match="finalize"):
                reducer.finalize()
        assert reducer.stats().total_wire_nbytes == wire
        model.loss(ctx.rank, 2).backward()
        reducer.finalize()
        return model

    for model in run_ranks(rank, make_contexts(NAMED["2x2"])):
        assert_equal(model, local_gradients(4, [0, 1, 2]))


class Branches(nn.Module):
    """Two branches whose order in backward depends on ``flip``: hooks fire in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(16, 16)
        self.right = nn.Linear(16, 16)
        self.last = nn.Linear(16, 1)
        ternary_(self)

    def forward(self, x: torch.Tensor, flip: bool) -> torch.Tensor:
        if flip:
            a = self.left(x)
            return self.last(a + self.right(x))
        b = self.right(x)
        return self.last(self.left(x) + b)


class FiringOrder(Reducer):
    """Planted mutant: launches each bucket as soon as it is full."""

    def _launch_ready(self) -> None:
        for bucket in self._buckets:
            if bucket.state is BucketState.READY:
                bucket.advance(BucketState.IN_FLIGHT)
                self._works.append(self._launch(bucket.layout))


def run_branches(ctx: Any, kind: type[Reducer]) -> tuple[list[str], list[Any], nn.Module]:
    model = Branches()
    fired: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    reducer = kind(model, ctx=ctx, bucket_cap_mb=1e-6, compress="topk:0.5/b16")  # one parameter per bucket
    before = len(getattr(ctx, "issued", []))
    model(torch.full((1, 16), float(ctx.rank + 1)), flip=ctx.rank % 2 == 1).sum().backward()
    reducer.finalize()
    return fired, list(getattr(ctx, "issued", []))[before:], model


def test_buckets_launch_in_index_order_whatever_order_hooks_fire(make_contexts: MakeContexts) -> None:
    results = run_ranks(lambda ctx: run_branches(ctx, Reducer), make_contexts(NAMED["2x2"]))
    fired = [fired for fired, _, _ in results]
    assert fired[0] != fired[1], "the control: hooks must fire in different orders for this to say anything"
    assert all(issued == results[0][1] for _, issued, _ in results)
    for name, parameter in results[0][2].named_parameters():
        assert all(torch.equal(parameter.grad, dict(m.named_parameters())[name].grad) for _, _, m in results)


def test_mutant_that_launches_in_firing_order_is_caught(make_contexts: MakeContexts) -> None:
    with pytest.raises(PlanMismatchError):
        run_ranks(lambda ctx: run_branches(ctx, FiringOrder), make_contexts(NAMED["2x2"]))


def test_buckets_launch_while_backward_goes_on(make_contexts: MakeContexts) -> None:
    """When the gradient of the first layer is about to be computed, later layers are in flight already."""

    def rank(ctx: Any) -> list[BucketState]:
        model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
        reducer = Reducer(model, ctx=ctx, bucket_cap_mb=1e-3)
        seen: list[BucketState] = []
        model[0].weight.register_hook(lambda _: seen.extend(b.state for b in reducer._buckets))
        model(torch.ones(2, 16)).sum().backward()
        reducer.finalize()
        assert all(bucket.state is BucketState.DONE for bucket in reducer._buckets)
        return seen

    for seen in run_ranks(rank, make_contexts(NAMED["2x2"])):
        assert seen[0] is BucketState.IN_FLIGHT
        assert seen[-1] is BucketState.FILLING


def test_unused_parameters_are_named(make_contexts: MakeContexts) -> None:
    def rank(ctx: Any) -> None:
        model = Branches()
        reducer = Reducer(model, ctx=ctx)
        model.last(model.left(torch.ones(1, 16))).sum().backward()
        with pytest.raises(UnsupportedError, match=r"right\.weight.*requires_grad=False.*unused='zero'"):
            reducer.finalize()
        model.zero_grad()
        model(torch.ones(1, 16), flip=False).sum().backward()  # the next step starts afresh
        reducer.finalize()

    run_ranks(rank, make_contexts(NAMED["2x2"]))


def test_unused_parameters_can_count_as_zero(make_contexts: MakeContexts) -> None:
    """One rank of four uses the branch: its share of the mean reaches all, also those with no gradient."""

    def rank(ctx: Any) -> Any:
        model = Branches()
        reducer = Reducer(model, ctx=ctx, unused="zero", bucket_cap_mb=1e-6)
        x = torch.full((1, 16), 4.0)
        (model(x, flip=False) if ctx.rank == 2 else model.last(model.left(x))).sum().backward()
        reducer.finalize()
        return model.right.weight.grad

    weight = Branches()
    weight(torch.full((1, 16), 4.0), flip=False).sum().backward()
    assert weight.right.weight.grad is not None
    for grad in run_ranks(rank, make_contexts(NAMED["2x2"])):
        assert torch.equal(grad, weight.right.weight.grad / 4)


def test_shared_parameters_are_reduced_once() -> None:
    reducer = Reducer(ExactNet(), ctx=make_fake_contexts(NAMED["1x1"])[0])
    names = [name for layout in reducer.layouts for name in layout.names]
    assert names.count("embed.weight") == 1
    assert "head.weight" not in names


def test_parameters_start_as_rank_zeros(make_contexts: MakeContexts) -> None:
    def rank(ctx: Any) -> Any:
        model = nn.Linear(3, 5)
        with torch.no_grad():
            model.weight.fill_(ctx.rank + 7.0)
        Reducer(model, ctx=ctx)
        return model.weight.detach()

    for weight in run_ranks(rank, make_contexts(NAMED["2+1"])):
        assert torch.equal(weight, torch.full((5, 3), 7.0))


def test_ranks_with_other_models_all_raise(make_contexts: MakeContexts) -> None:
    def rank(ctx: Any) -> None:
        with pytest.raises(PlanMismatchError, match="other parameters"):
            Reducer(nn.Linear(3, 5 if ctx.rank else 6), ctx=ctx)

    run_ranks(rank, make_contexts(NAMED["2x2"]))


def test_misuse_is_named(make_contexts: MakeContexts) -> None:
    def rank(ctx: Any) -> None:
        model = ExactNet()
        reducer = Reducer(model, ctx=ctx)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        reducer.attach(optimizer)
        model.loss(ctx.rank, 0).backward()
        with pytest.raises(HybridCommError, match="before finalize"):
            optimizer.step()
        with pytest.raises(HybridCommError, match=r"second gradient.*no_sync"):
            model.loss(ctx.rank, 1).backward()
        reducer.rollback()
        reducer.close()
        model.loss(ctx.rank, 2).backward()
        with pytest.raises(HybridCommError, match="without a synchronised backward"):
            reducer.finalize()

    run_ranks(rank, make_contexts(NAMED["2x2"]))


def test_bad_settings_are_named() -> None:
    ctx = make_fake_contexts(NAMED["1x1"])[0]
    frozen = nn.Linear(2, 2).requires_grad_(False)
    for module, fields, error in (
        (frozen, {}, UnsupportedError),
        (nn.Linear(2, 2), {"unused": "ignore"}, UnsupportedError),
        (nn.Linear(2, 2, dtype=torch.complex64), {}, DataTypeError),
        (nn.Linear(2, 2), {"bucket_cap_mb": 0.0}, UnsupportedError),
    ):
        with pytest.raises(error):
            Reducer(module, ctx=ctx, **fields)  # type: ignore[arg-type]
    sparse = nn.Embedding(4, 2, sparse=True)
    Reducer(sparse, ctx=ctx)
    with pytest.raises(DataTypeError, match="not dense"):
        sparse(torch.tensor([1])).sum().backward()


def test_stats_count_and_table_tells_what_is_active(make_contexts: MakeContexts) -> None:
    def rank(ctx: Any) -> tuple[Reducer, str]:
        model = nn.Linear(512, 512, bias=False)
        reducer = Reducer(model, ctx=ctx, compress="topk:0.01")
        model(torch.ones(1, 512) * (ctx.rank + 1)).sum().backward()
        reducer.finalize()
        reducer.commit()
        return reducer, reducer.table()

    for name, active in (("2x2", "topk:0.01/b1024/k10/v6"), ("1x4", "no peer (one node)")):
        for reducer, table in run_ranks(rank, make_contexts(NAMED[name])):
            stats = reducer.stats()
            assert "topk:0.01" in table
            assert active in table
            assert (stats.steps, stats.applied) == (1, 1)
            assert stats.exposed_seconds >= 0
            if name == "2x2":
                assert 0 < stats.wire_nbytes < 512 * 512 * 4 // 2 // 100
                assert stats.residual_nbytes == 2 * 512 * 512 * 4 // 2
                assert float(table.splitlines()[2].split()[-1]) > 100
            else:
                assert stats.wire_nbytes == 0


# -- buckets that are held back --------------------------------------------------------------------------------


def test_held_buckets_are_launched_when_they_are_released(make_contexts: MakeContexts) -> None:
    def rank(ctx: Any) -> nn.Module:
        model = ExactNet()
        reducer = Reducer(model, ctx=ctx, bucket_cap_mb=SMALL_MB)
        reducer.hold()
        for _ in range(2):
            model.zero_grad()
            reducer.release(1)  # before it is full: goes in backward
            model.loss(ctx.rank, 0).backward()
            assert [reducer.launched(bucket) for bucket in range(3)] == [True, False, False]
            reducer.release(2)
            assert [reducer.launched(bucket) for bucket in range(3)] == [True, True, False]
            reducer.release(len(reducer.layouts))
            reducer.finalize()
            reducer.commit()
        return model

    for model in run_ranks(rank, make_contexts(NAMED["2x2"])):
        assert_equal(model, local_gradients(4, [0]))


def test_a_step_that_ends_with_held_buckets_is_told(make_contexts: MakeContexts) -> None:
    def rank(ctx: Any) -> None:
        model = ExactNet()
        reducer = Reducer(model, ctx=ctx, bucket_cap_mb=SMALL_MB)
        reducer.hold()
        reducer.release(1)
        model.loss(ctx.rank, 0).backward()
        with pytest.raises(HybridCommError, match=r"buckets 1\.\.\d are held back; call release"):
            reducer.finalize()
        assert not reducer.launched(0)

    run_ranks(rank, make_contexts(NAMED["1x4"]))
