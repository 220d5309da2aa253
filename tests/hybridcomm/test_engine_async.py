"""Asynchronous collectives: order, lifetime of tensors, waits in any order, random programs of all ranks."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm.context import Context
from hybridcomm.errors import StallError
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts
from tests.exact import exact_ints, exact_sum
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks

NAMES = ["1x4", "2x2", "4x1", "3+2", "2+1+1"]


@pytest.fixture(params=NAMES, scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[list[Context]]:
    with engine_contexts(NAMED[request.param]) as contexts:
        yield contexts


def value(rank: int, world: int, numel: int, call: int) -> np.ndarray[Any, Any]:
    return exact_ints(rank=rank, numel=numel, world=world, call=call).astype(np.float32)


def total(world: int, numel: int, call: int) -> np.ndarray[Any, Any]:
    return exact_sum(numel=numel, world=world, call=call).astype(np.float32)


def test_many_in_flight_waited_in_any_order(ranks: list[Context]) -> None:
    """Each rank waits in an order of its own, with blocking calls among the asynchronous ones."""
    world = len(ranks)
    numels = [random.Random(5).choice([1, 17, 1000, 40_000]) for _ in range(60)]

    def body(ctx: Context) -> None:
        dice = random.Random(ctx.rank)
        values = [value(ctx.rank, world, numel, call) for call, numel in enumerate(numels)]
        works = []
        for call, array in enumerate(values):
            work = ctx.allreduce(array, async_op=call % 7 != 3)
            if work is None:
                assert array.tobytes() == total(world, array.size, call).tobytes()
            else:
                works.append((call, work))
        dice.shuffle(works)
        for call, work in works:
            assert work.wait()
            assert work.is_completed()
            assert values[call].tobytes() == total(world, numels[call], call).tobytes()
        for _, work in works:
            assert work.wait(), "waiting twice is allowed"

    run_ranks(body, ranks)


def test_a_dropped_work_keeps_its_tensor_alive_until_it_is_done(ranks: list[Context]) -> None:
    """Rank 0 holds all others back; their handles and tensors are dropped meanwhile, and memory is churned."""
    world, numel = len(ranks), 5000
    hold = threading.Event()

    def body(ctx: Context) -> None:
        if ctx.rank == 0:
            hold.wait(20)
        array = torch.from_numpy(value(ctx.rank, world, numel, 1))
        died: list[float] = []
        weakref.finalize(array, lambda: died.append(time.monotonic()))
        ctx.allreduce(array, async_op=True)
        del array
        if ctx.rank == world - 1:
            gc.collect()
            assert not died, "freed while the engine may still write it"
            churn = [np.full(numel, 7.0, np.float32) for _ in range(50)]
            hold.set()
            assert all((c == 7.0).all() for c in churn)
        check = value(ctx.rank, world, 17, 2)
        ctx.allreduce(check)
        assert check.tobytes() == total(world, 17, 2).tobytes()
        ctx.allreduce(np.zeros(1, np.float32), async_op=True).wait()
        gc.collect()
        assert died, "kept alive for ever"

    run_ranks(body, ranks)


def test_closing_finishes_what_is_queued() -> None:
    with engine_contexts(NAMED["2x2"]) as contexts:

        def body(rank: int) -> None:
            arrays = [value(rank, 4, 3000, call) for call in range(10)]
            for array in arrays:
                contexts[rank].allreduce(array, async_op=True)
            contexts[rank].close()
            for call, array in enumerate(arrays):
                assert array.tobytes() == total(4, 3000, call).tobytes()

        assert each_rank(body, 4) == [None] * 4


def test_dropping_the_context_finishes_what_is_queued() -> None:
    contexts: list[Any] = []
    with engine_contexts(Topology.virtual(1, 2)) as made:
        contexts.extend(made)
        arrays = [value(rank, 2, 50_000, 0) for rank in range(2)]
        for rank in range(2):
            made[rank].allreduce(arrays[rank], async_op=True)
        made.clear()
        each_rank(lambda rank: contexts.__setitem__(rank, None), 2)
        gc.collect()
        assert [a.tobytes() for a in arrays] == [total(2, 50_000, 0).tobytes()] * 2


def test_wait_with_a_timeout_raises_and_the_work_goes_on() -> None:
    with engine_contexts(NAMED["2x2"]) as contexts:

        def body(rank: int) -> None:
            array = value(rank, 4, 100, 0)
            if rank == 3:
                time.sleep(0.6)
            work = contexts[rank].allreduce(array, async_op=True)
            assert work is not None
            if rank == 0:
                assert not work.is_completed()
                assert (work.seconds, work.wire_nbytes) == (0, 0)
                with pytest.raises(StallError, match="wait"):
                    work.wait(0.05)
            assert work.wait(20)
            assert work.seconds > 0
            assert array.tobytes() == total(4, 100, 0).tobytes()

        assert each_rank(body, 4) == [None] * 4


def test_futures_hold_the_result() -> None:
    with engine_contexts(NAMED["2x2"]) as contexts:

        def body(rank: int) -> None:
            array = torch.from_numpy(value(rank, 4, 100, 0))
            work = contexts[rank].all_reduce(array, async_op=True)
            assert work is not None
            assert torch.equal(work.get_future().wait()[0], torch.from_numpy(total(4, 100, 0)))

        assert each_rank(body, 4) == [None] * 4


def test_interference_of_threads_of_one_rank() -> None:
    """Two threads of every rank use one context: each call is whole, in whatever order both ranks agree on."""
    with engine_contexts(Topology.virtual(1, 1)) as contexts:

        def body(_: int) -> None:
            for call in range(200):
                array = value(0, 1, 1000, call)
                work = contexts[0].allreduce(array, async_op=call % 2 == 0)
                if work is not None:
                    work.wait()
                assert array.tobytes() == total(1, 1000, call).tobytes()

        assert each_rank(body, 4) == [None] * 4


OPS = (
    "allreduce",
    "mean",
    "broadcast",
    "all_gather",
    "reduce_scatter",
    "barrier",
    "reduce",
    "gather",
    "scatter",
    "all_to_all",
    "uneven",
    "coalesced",
)


class _Together:
    """Several arrays that are compared as one."""

    def __init__(self, arrays: list[np.ndarray[Any, Any]]) -> None:
        self._arrays = arrays

    def tobytes(self) -> bytes:
        return b"".join(array.tobytes() for array in self._arrays)


class Machine:
    """One rank's run of a random program that all ranks draw alike from the seed."""

    def __init__(self, ctx: Context, seed: int) -> None:
        self.ctx, self.dice, self.world = ctx, random.Random(seed), ctx.world_size
        self.own = random.Random(1000 * seed + ctx.rank)  # what ranks may do differently: when to wait
        self.open: list[tuple[Any, Any, np.ndarray[Any, Any]]] = []

    def run(self, calls: int) -> None:
        for call in range(calls):
            op, numel = self.dice.choice(OPS), self.dice.choice([0, 1, 16, 97, 1024, 30_000])
            blocking, root = self.dice.random() < 0.4, self.dice.randrange(self.world)
            work, got, want = getattr(self, f"_{op}")(numel, call, root, not blocking)
            if work is None:
                assert got.tobytes() == want.tobytes(), (op, numel, call)
            else:
                self.open.append((work, got, want))
            while self.open and self.own.random() < 0.4:
                self.settle(self.own.randrange(len(self.open)))
        while self.open:
            self.settle(0)

    def settle(self, index: int) -> None:
        work, got, want = self.open.pop(index)
        work.wait()
        assert got.tobytes() == want.tobytes()

    def _allreduce(self, numel: int, call: int, _: int, later: bool) -> tuple[Any, Any, Any]:
        array = value(self.ctx.rank, self.world, numel, call)
        return self.ctx.allreduce(array, async_op=later), array, total(self.world, numel, call)

    def _mean(self, numel: int, call: int, _: int, later: bool) -> tuple[Any, Any, Any]:
        array = value(self.ctx.rank, self.world**2, numel, call) * self.world
        want = np.sum([value(rank, self.world**2, numel, call) for rank in range(self.world)], axis=0)
        return self.ctx.allreduce(array, op="mean", async_op=later), array, want.astype(np.float32)

    def _broadcast(self, numel: int, call: int, root: int, later: bool) -> tuple[Any, Any, Any]:
        array = value(self.ctx.rank, self.world, numel, call)
        return self.ctx.broadcast(array, root, async_op=later), array, value(root, self.world, numel, call)

    def _all_gather(self, numel: int, call: int, _: int, later: bool) -> tuple[Any, Any, Any]:
        out = np.full(numel * self.world, -1, np.float32)
        work = self.ctx.all_gather(out, value(self.ctx.rank, self.world, numel, call), async_op=later)
        return work, out, np.concatenate([value(rank, self.world, numel, call) for rank in range(self.world)])

    def _reduce_scatter(self, numel: int, call: int, _: int, later: bool) -> tuple[Any, Any, Any]:
        out = np.full(numel, -1, np.float32)
        whole = value(self.ctx.rank, self.world, numel * self.world, call)
        work = self.ctx.reduce_scatter(out, whole, async_op=later)
        part = slice(self.ctx.rank * numel, (self.ctx.rank + 1) * numel)
        return work, out, total(self.world, numel * self.world, call)[part]

    def _reduce(self, numel: int, call: int, root: int, later: bool) -> tuple[Any, Any, Any]:
        array = value(self.ctx.rank, self.world, numel, call)
        want = total(self.world, numel, call) if self.ctx.rank == root else array.copy()
        return self.ctx.reduce(array, root, async_op=later), array, want

    def _gather(self, numel: int, call: int, root: int, later: bool) -> tuple[Any, Any, Any]:
        mine, out = value(self.ctx.rank, self.world, numel, call), np.zeros((self.world, numel), np.float32)
        own = self.ctx.rank == root
        work = self.ctx.gather(mine, list(out) if own else None, root, async_op=later)
        want = np.stack([value(rank, self.world, numel, call) for rank in range(self.world)])
        return work, out, want if own else np.zeros_like(want)

    def _scatter(self, numel: int, call: int, root: int, later: bool) -> tuple[Any, Any, Any]:
        given = [value(rank, self.world, numel, call) for rank in range(self.world)]
        out = np.zeros(numel, np.float32)
        work = self.ctx.scatter(out, given if self.ctx.rank == root else None, root, async_op=later)
        return work, out, given[self.ctx.rank]

    def _all_to_all(self, numel: int, call: int, _: int, later: bool) -> tuple[Any, Any, Any]:
        mine = value(self.ctx.rank, self.world, numel * self.world, call)
        out = np.zeros_like(mine)
        part = slice(self.ctx.rank * numel, (self.ctx.rank + 1) * numel)
        want = [value(rank, self.world, numel * self.world, call)[part] for rank in range(self.world)]
        return self.ctx.all_to_all_single(out, mine, async_op=later), out, np.concatenate(want)

    def _uneven(self, numel: int, call: int, root: int, later: bool) -> tuple[Any, Any, Any]:
        """Rank i sends (i + j + root) % 3 times numel elements to rank j."""
        sizes = [[(i + j + root) % 3 * numel for j in range(self.world)] for i in range(self.world)]
        me, taken = self.ctx.rank, [row[self.ctx.rank] for row in sizes]
        mine, out = value(me, self.world, sum(sizes[me]), call), np.zeros(sum(taken), np.float32)
        work = self.ctx.all_to_all_single(out, mine, taken, sizes[me], async_op=later)
        want = []
        for rank, row in enumerate(sizes):
            begin = sum(row[:me])
            want.append(value(rank, self.world, sum(row), call)[begin : begin + row[me]])
        return work, out, np.concatenate(want)

    def _coalesced(self, numel: int, call: int, _: int, later: bool) -> tuple[Any, Any, Any]:
        arrays = [value(self.ctx.rank, self.world, n, call) for n in (numel, 3, 5)]
        with self.ctx.coalescing(async_op=later) as batch:
            for array in arrays:
                self.ctx.allreduce(array)
        want = np.concatenate([total(self.world, n, call) for n in (numel, 3, 5)])
        return batch.work, _Together(arrays), want

    def _barrier(self, _: int, __: int, ___: int, later: bool) -> tuple[Any, Any, Any]:
        return self.ctx.barrier(async_op=later), np.zeros(1), np.zeros(1)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=8)
def test_random_programs(ranks: list[Context], seed: int) -> None:
    run_ranks(lambda ctx: Machine(ctx, seed).run(25), ranks)


def test_barrier_lets_nobody_out_before_all_are_in(ranks: list[Context]) -> None:
    entered = [0.0] * len(ranks)
    left = [0.0] * len(ranks)

    def body(ctx: Context) -> None:
        time.sleep(0.05 * ctx.rank)
        entered[ctx.rank] = time.monotonic()
        ctx.barrier()
        left[ctx.rank] = time.monotonic()

    run_ranks(body, ranks)
    assert max(entered) <= min(left)
