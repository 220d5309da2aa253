"""Several collectives as one: the results of single calls, fewer messages, one handle; what has no place is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import hybridcomm
from hybridcomm import coalesce
from hybridcomm.context import Context
from hybridcomm.errors import HybridCommError, PlanMismatchError, UnsupportedError
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts
from tests.exact import exact_ints, exact_sum
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks

SIZES = (3, 0, 1, 700, 40_001, 16, 70_000, 17)
"""Small ones, which are packed, between large ones, which stay where they are."""


@pytest.fixture(scope="module", params=["1x4", "2x2", "4x1", "2+1", "3+2"])
def ranks(request: pytest.FixtureRequest) -> Iterator[list[Context]]:
    with engine_contexts(NAMED[request.param]) as contexts:
        yield contexts


def value(rank: int, numel: int, world: int, call: int = 0) -> torch.Tensor:
    return torch.from_numpy(exact_ints(rank=rank, numel=numel, world=world, call=call).astype(np.float32))


def total(numel: int, world: int, call: int = 0) -> torch.Tensor:
    return torch.from_numpy(exact_sum(numel=numel, world=world, call=call).astype(np.float32))


@pytest.mark.parametrize("later", [False, True])
def test_allreduces(ranks: list[Context], later: bool) -> None:
    world = len(ranks)

    def body(ctx: Context) -> None:
        tensors = [value(ctx.rank, n, world, call=i) for i, n in enumerate(SIZES)]
        with ctx.coalescing(async_op=later) as work:
            for tensor in tensors:
                assert ctx.all_reduce(tensor) is None
        assert (work.work is not None) == later
        assert work.wait()
        for i, tensor in enumerate(tensors):
            assert torch.equal(tensor, total(SIZES[i], world, call=i)), i

    run_ranks(body, ranks)


@pytest.mark.parametrize("later", [False, True])
def test_all_gathers_and_reduce_scatters(ranks: list[Context], later: bool) -> None:
    world = len(ranks)

    def body(ctx: Context) -> None:
        me = ctx.rank
        outs = [torch.zeros(n * world) for n in SIZES]
        uneven = [torch.zeros(5 * r) for r in range(world)]
        with ctx.coalescing(async_op=later) as work:
            for i, out in enumerate(outs):
                ctx.all_gather_into_tensor(out, value(me, SIZES[i], world, call=i))
            ctx.all_gather(uneven, value(me, 5 * me, world, call=77))
        work.wait()
        for i, out in enumerate(outs):
            want = [value(r, SIZES[i], world, call=i) for r in range(world)]
            assert torch.equal(out, torch.cat(want)), i
        assert all(torch.equal(t, value(r, 5 * r, world, call=77)) for r, t in enumerate(uneven))

        wholes = [value(me, n * world, world, call=i) for i, n in enumerate(SIZES)]
        kept = [whole.clone() for whole in wholes]
        parts = [torch.zeros(n) for n in SIZES]
        with ctx.coalescing(async_op=later) as work:
            for part, whole in zip(parts, wholes, strict=True):
                ctx.reduce_scatter_tensor(part, whole)
        work.wait()
        for i, (part, n) in enumerate(zip(parts, SIZES, strict=True)):
            assert torch.equal(part, total(n * world, world, call=i)[me * n : (me + 1) * n]), i
        assert all(torch.equal(left, right) for left, right in zip(wholes, kept, strict=True)), "written"

    run_ranks(body, ranks)


def test_ops_with_factors_and_means(ranks: list[Context]) -> None:
    world = len(ranks)

    def body(ctx: Context) -> None:
        tensors = [torch.full((n,), float(ctx.rank + 1)) for n in (5, 40_000)]
        with ctx.coalescing():
            for tensor in tensors:
                ctx.allreduce(tensor, op=hybridcomm.premul_sum(2.0))
        assert all((t == world * (world + 1)).all() for t in tensors)
        with ctx.coalescing():
            for tensor in tensors:
                ctx.allreduce(tensor, op="avg")
        assert all((t == world * (world + 1)).all() for t in tensors)
        outs = [torch.zeros(n) for n in (5, 40_000)]
        with ctx.coalescing():
            for out in outs:
                ctx.reduce_scatter_tensor(out, torch.ones(out.numel() * world), op=hybridcomm.premul_sum(2.0))
        assert all((t == 2 * world).all() for t in outs)

    run_ranks(body, ranks)


def test_one_message_carries_them_all() -> None:
    """40 tensors of 8 elements: as many bytes on the wire, framing included, as one tensor of 320."""
    with engine_contexts(Topology.virtual(2, 1)) as contexts:

        def sent(ctx: Context, call: Callable[[], Any]) -> int:
            before = ctx.counters()["wire_tx_bytes"]
            call()
            return ctx.counters()["wire_tx_bytes"] - before

        def body(rank: int) -> tuple[int, int, int]:
            ctx = contexts[rank]
            tensors = [np.ones(8, np.float32) for _ in range(40)]

            def coalesced() -> None:
                with ctx.coalescing():
                    each()

            def each() -> None:
                for tensor in tensors:
                    ctx.allreduce(tensor)

            one = sent(ctx, lambda: ctx.allreduce(np.ones(320, np.float32)))
            return one, sent(ctx, coalesced), sent(ctx, each)

        for one, coalesced, each in each_rank(body, 2):
            assert coalesced == one < each // 2


REFUSED: dict[str, Callable[[Context], Any]] = {
    "another collective": lambda c: c.all_gather_into_tensor(
        np.zeros(2 * c.world_size, np.float32), np.zeros(2, np.float32)
    ),
    "another dtype": lambda c: c.allreduce(np.zeros(4)),
    "another op": lambda c: c.allreduce(np.zeros(4, np.float32), op="max"),
    "one that cannot be coalesced": lambda c: c.broadcast(np.zeros(4, np.float32)),
    "compression": lambda c: c.allreduce(np.zeros(4, np.float32), compress="topk"),
    "async_op": lambda c: c.allreduce(np.zeros(4, np.float32), async_op=True),
    "a barrier": lambda c: c.barrier(),
    "another block": lambda c: c.coalescing().__enter__(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_a_part_of_a_block(ranks: list[Context], what: str) -> None:
    """Refused before anything is sent: the ranks agree afterwards, and an empty block does nothing."""

    def body(ctx: Context) -> None:
        array = np.ones(4, np.float32)

        def block() -> None:
            with ctx.coalescing():
                ctx.allreduce(array)
                REFUSED[what](ctx)

        if ctx.rank == 0:
            with pytest.raises(UnsupportedError, match="coalescing"):
                block()
        assert (array == 1).all(), "the block ran all the same"
        with ctx.coalescing(async_op=True) as work:
            if what == "another block":
                with pytest.raises(UnsupportedError, match="block ends"):
                    work.wait()
        assert work.wait()
        ctx.allreduce(array)
        assert (array == len(ranks)).all()

    run_ranks(body, ranks)


@pytest.mark.parametrize("odd", ["other sizes of the same sum", "one call of that size"])
def test_blocks_that_differ_are_an_error_on_every_rank(odd: str) -> None:
    with engine_contexts(Topology.virtual(2, 2)) as contexts:

        def body(rank: int) -> Any:
            ctx = contexts[rank]
            sizes = (6, 4) if rank != 3 else (5, 5)
            try:
                if rank == 3 and odd == "one call of that size":
                    ctx.allreduce(np.ones(10, np.float32))
                else:
                    with ctx.coalescing():
                        for size in sizes:
                            ctx.allreduce(np.ones(size, np.float32))
                for _ in range(3):
                    ctx.barrier()
            except HybridCommError as error:
                return error
            return None

        errors = each_rank(body, 4)
        assert all(isinstance(error, HybridCommError) for error in errors), errors
        assert any(isinstance(error, PlanMismatchError) for error in errors)


def test_a_packed_tensor_that_is_not_copied_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of this file."""
    monkeypatch.setattr("hybridcomm.memory.Memory.copy_later", lambda *_: None)
    with engine_contexts(Topology.virtual(1, 2)) as contexts:

        def body(ctx: Context) -> bool:
            tensors = [value(ctx.rank, n, 2) for n in (5, 6)]
            with ctx.coalescing():
                for tensor in tensors:
                    ctx.allreduce(tensor)
            return all(torch.equal(t, total(t.numel(), 2)) for t in tensors)

        assert run_ranks(body, contexts) == [False, False]


def test_the_sizes_of_these_tests_are_on_both_sides_of_the_limit() -> None:
    nbytes = [4 * n for n in SIZES]
    assert min(nbytes) < coalesce.PACKED_NBYTES < max(nbytes)
