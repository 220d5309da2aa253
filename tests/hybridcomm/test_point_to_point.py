"""Point-to-point messages: exact data over every pair, matching by tag, no deadlocks."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch

import hybridcomm
from hybridcomm.context import Context
from hybridcomm.errors import StallError
from hybridcomm.lower import DTYPES
from hybridcomm.point_to_point import P2POp, batch_isend_irecv
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks

NAMES = ["2x2", "3+2", "2+1+1"]
# Empty, short, beside the limits of short messages (64 KiB) and of pieces (512 KiB), several pieces.
SIZES = [0, 1, 1000, 16 << 10, (16 << 10) + 1, (128 << 10) + 3, 600_001]


@pytest.fixture(params=NAMES, scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[list[Context]]:
    with engine_contexts(NAMED[request.param]) as contexts:
        yield contexts


def message(src: int, dst: int, tag: int, numel: int) -> np.ndarray[Any, Any]:
    seed = (src * 101 + dst) * 1009 + tag
    return (np.arange(numel, dtype=np.int64) * 7 + seed).astype(np.float32)


def test_every_pair_every_size(ranks: list[Context]) -> None:
    """All at once: each rank sends to and receives from every other, in an order of its own."""

    def body(ctx: Context) -> None:
        dice = random.Random(ctx.rank)
        jobs = [
            (peer, tag) for peer in range(ctx.world_size) if peer != ctx.rank for tag in range(len(SIZES))
        ]
        dice.shuffle(jobs)
        works = [ctx.isend(message(ctx.rank, peer, tag, SIZES[tag]), peer, tag) for peer, tag in jobs]
        dice.shuffle(jobs)
        for peer, tag in jobs:
            got = np.full(SIZES[tag], -1, np.float32)
            if dice.random() < 0.5:
                assert ctx.recv(got, peer, tag) == peer
            else:
                ctx.irecv(got, peer, tag).wait(20)
            assert got.tobytes() == message(peer, ctx.rank, tag, SIZES[tag]).tobytes(), (peer, tag)
        for work in works:
            assert work.wait(20)

    run_ranks(body, ranks)


def test_one_kind_of_message_stays_in_order(ranks: list[Context]) -> None:
    """Short ones, long ones and ones beyond the window of short ones, all with one tag."""
    numels = [random.Random(3).choice([0, 1, 16_000, 40_000, 200_000]) for _ in range(60)]

    def body(ctx: Context) -> None:
        if ctx.rank == 0:
            works = [ctx.isend(message(0, 1, i, n), ctx.world_size - 1, 5) for i, n in enumerate(numels)]
            assert all(work.wait(20) for work in works)
        elif ctx.rank == ctx.world_size - 1:
            time.sleep(0.1)
            for i, numel in enumerate(numels):
                got = np.empty(numel, np.float32)
                ctx.recv(got, 0, 5)
                assert got.tobytes() == message(0, 1, i, numel).tobytes()

    run_ranks(body, ranks)


def test_blocking_sends_against_each_other(ranks: list[Context]) -> None:
    """Short messages need no receiver; a pair that was never connected, the lower rank sending first."""

    def body(ctx: Context) -> None:
        others = [peer for peer in range(ctx.world_size) if peer != ctx.rank]
        for peer in others:
            ctx.send(message(ctx.rank, peer, 1, 100), peer, 1)
        for peer in reversed(others):
            got = np.empty(100, np.float32)
            ctx.recv(got, peer, 1)
            assert got.tobytes() == message(peer, ctx.rank, 1, 100).tobytes()

    run_ranks(body, ranks)


def test_long_messages_both_ways_in_one_batch(ranks: list[Context]) -> None:
    def body(ctx: Context) -> None:
        right, left = (ctx.rank + 1) % ctx.world_size, (ctx.rank - 1) % ctx.world_size
        got = np.empty(500_000, np.float32)
        ops = [
            P2POp(hybridcomm.isend, message(ctx.rank, right, 2, 500_000), right, ctx, 2),
            P2POp(hybridcomm.irecv, got, left, ctx, 2),
        ]
        (work,) = batch_isend_irecv(ops)
        assert work.wait(20)
        assert got.tobytes() == message(left, ctx.rank, 2, 500_000).tobytes()

    run_ranks(body, ranks)


def test_every_dtype(ranks: list[Context]) -> None:
    def body(ctx: Context) -> None:
        last = ctx.world_size - 1
        for tag, name in enumerate(DTYPES):
            dtype = getattr(torch, name)
            want = torch.arange(24 * 32, dtype=torch.int64).remainder(120).to(torch.uint8)
            want = want.remainder(2).view(torch.bool) if name == "bool" else want.view(dtype)
            if ctx.rank == 0:
                ctx.send(want, last, tag)
            elif ctx.rank == last:
                got = torch.zeros_like(want)
                ctx.recv(got, 0, tag)
                assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), name

    run_ranks(body, ranks)


def test_shared_tensors_are_read_where_they_lie() -> None:
    with engine_contexts(Topology.virtual(1, 2)) as contexts:

        def body(ctx: Context) -> None:
            t = ctx.empty(100_000, dtype="float32")
            t[:] = torch.from_numpy(message(0, 1, 0, 100_000)) if ctx.rank == 0 else -1
            if ctx.rank == 0:
                ctx.send(t[10:], 1)
                t[:] = -7  # nobody reads it any more
            else:
                time.sleep(0.05)
                ctx.recv(t[10:], 0)
                assert np.array_equal(t.numpy()[10:], message(0, 1, 0, 100_000)[10:])

        run_ranks(body, contexts)
        assert contexts[0].counters()["shm_bytes"] < 20_000, "no byte of it was copied to a slot"


def test_staged_where_memory_cannot_be_reached() -> None:
    """Without single copy a long message goes through the slots in pieces, when its receiver has said go."""
    with engine_contexts(Topology.virtual(1, 2), chunk_nbytes=4096, single_copy=False) as contexts:

        def body(ctx: Context) -> None:
            for tag, numel in enumerate([100, 1024, 1025, 300_001]):
                peer, got = 1 - ctx.rank, np.empty(numel, np.float32)
                work = ctx.isend(message(ctx.rank, peer, tag, numel), peer, tag)
                ctx.recv(got, peer, tag)
                assert got.tobytes() == message(peer, ctx.rank, tag, numel).tobytes()
                work.wait(20)

        run_ranks(body, contexts)


def test_unasked_messages_do_not_stop_collectives(ranks: list[Context]) -> None:
    """Many more than the slots and the ring hold, before anyone asks; all-reduces go on beside them."""

    def body(ctx: Context) -> None:
        right, left = (ctx.rank + 1) % ctx.world_size, (ctx.rank - 1) % ctx.world_size
        works = [ctx.isend(message(ctx.rank, right, tag, 2000), right, tag) for tag in range(300)]
        for call in range(20):
            t = np.full(10_000, ctx.rank + call, np.float32)
            ctx.allreduce(t)
            assert (t == sum(range(ctx.world_size)) + ctx.world_size * call).all()
        for tag in reversed(range(300)):
            got = np.empty(2000, np.float32)
            ctx.recv(got, left, tag)
            assert got.tobytes() == message(left, ctx.rank, tag, 2000).tobytes()
        assert all(work.wait(20) for work in works)

    run_ranks(body, ranks)


@pytest.mark.parametrize("numel", [500, 40_000])
def test_a_collective_that_fills_its_slots_holds_no_message_up(numel: int) -> None:
    """Its peer takes part only once it has the message: slots for both kinds would be a deadlock."""
    with engine_contexts(Topology.virtual(1, 2), chunk_nbytes=4096, single_copy=False) as contexts:

        def body(ctx: Context) -> None:
            bucket = np.full(100_000, ctx.rank + 1, np.float32)
            if ctx.rank == 0:
                work = ctx.allreduce(bucket, async_op=True)
                assert work is not None
                while not ctx.counters()["shm_bytes"]:
                    time.sleep(0.001)  # until chunks lie in the slots
                ctx.send(message(0, 1, 0, numel), 1)
                work.wait(20)
            else:
                got = np.empty(numel, np.float32)
                ctx.recv(got, 0)
                assert got.tobytes() == message(0, 1, 0, numel).tobytes()
                ctx.allreduce(bucket)
            assert (bucket == 3).all()

        run_ranks(body, contexts, timeout=50)


def test_a_pipeline_with_buckets_between(ranks: list[Context]) -> None:
    """Microbatches down the ranks and back, asynchronous all-reduces in between, at other places on each rank."""
    microbatches, numel = 12, 30_000

    def body(ctx: Context) -> None:
        down, up = ctx.rank + 1, ctx.rank - 1
        works, buckets, kept = [], [], []
        for m in range(microbatches):
            if up >= 0:
                got = np.empty(numel, np.float32)
                work = ctx.irecv(got, up, m)
                kept.append((work, got, message(up, ctx.rank, m, numel)))
                work.wait(20)
            if m % 3 == ctx.rank % 3:
                bucket = np.full(5000, m // 3 + ctx.rank, np.float32)
                buckets.append((m // 3, ctx.allreduce(bucket, async_op=True), bucket))
            if down < ctx.world_size:
                works.append(ctx.isend(message(ctx.rank, down, m, numel), down, m))
        for work, got, want in kept:
            assert work.is_completed()
            assert got.tobytes() == want.tobytes()
        for call, work, bucket in buckets:
            assert work is not None
            work.wait(20)
            assert (bucket == sum(range(ctx.world_size)) + ctx.world_size * call).all()
        for work in works:
            work.wait(20)

    run_ranks(body, ranks)


def test_messages_go_on_when_a_wait_has_ended(ranks: list[Context]) -> None:
    """Who waits works on all messages; behind it somebody else must, without being asked."""
    receiver, sender = 0, len(ranks) - 1

    def body(ctx: Context) -> None:
        if ctx.rank == sender:
            ctx.send(message(sender, receiver, 1, 200_000), receiver, 1)
            time.sleep(0.1)
            ctx.send(message(sender, receiver, 2, 200_000), receiver, 2)
        elif ctx.rank == receiver:
            later, got = np.zeros(200_000, np.float32), np.zeros(200_000, np.float32)
            open_work = ctx.irecv(later, sender, 2)
            assert ctx.irecv(got, sender, 1).wait(20)
            deadline = time.monotonic() + 20
            while not open_work.is_completed():
                assert time.monotonic() < deadline, "nobody works on the message that is still open"
                time.sleep(0.001)
            assert got.tobytes() == message(sender, receiver, 1, 200_000).tobytes()
            assert later.tobytes() == message(sender, receiver, 2, 200_000).tobytes()

    run_ranks(body, ranks)


def test_threads_of_a_rank_wait_for_messages_and_for_a_collective(ranks: list[Context]) -> None:
    """Nobody's wait keeps another from its end, whatever comes first."""
    receiver, sender, tags = 0, len(ranks) - 1, range(3)
    got = [np.zeros(50_000, np.float32) for _ in tags]
    waiting = threading.Barrier(len(tags) + 1)

    def wait_for(ctx: Context, tag: int) -> None:
        work = ctx.irecv(got[tag], sender, tag)
        waiting.wait(20)
        assert work.wait(20)

    def body(ctx: Context) -> None:
        threads = []
        if ctx.rank == receiver:
            threads = [threading.Thread(target=wait_for, args=(ctx, tag)) for tag in tags]
            for thread in threads:
                thread.start()
            waiting.wait(20)
            time.sleep(0.05)
        values = np.full(1000, float(ctx.rank), np.float32)
        ctx.allreduce(values)
        assert (values == sum(range(ctx.world_size))).all()
        if ctx.rank == sender:
            for tag in reversed(tags):
                ctx.send(message(sender, receiver, tag, 50_000), receiver, tag)
                time.sleep(0.02)
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()

    run_ranks(body, ranks)
    for tag in tags:
        assert got[tag].tobytes() == message(sender, receiver, tag, 50_000).tobytes()


def test_a_wait_that_is_over_in_time_leaves_its_message_open() -> None:
    with engine_contexts(NAMED["2x2"]) as contexts:

        def body(rank: int) -> None:
            if rank == 0:
                got = np.zeros(4, np.float32)
                work = contexts[0].irecv(got, 1)
                with pytest.raises(StallError, match=r"not done after 0\.05 s; it goes on"):
                    work.wait(0.05)
                contexts[0].send(got, 1, 9)
                assert work.wait(20)
                assert (got == 7).all()
            elif rank == 1:
                contexts[1].recv(np.zeros(4, np.float32), 0, 9)
                contexts[1].send(np.full(4, 7, np.float32), 0)

        assert each_rank(body, 4) == [None] * 4


def test_a_collective_counts_its_own_bytes_alone() -> None:
    """Messages go out while it runs, in the same engine; the context counts both."""
    numel = 1 << 20
    with engine_contexts(Topology.virtual(2, 1)) as contexts:

        def body(ctx: Context) -> tuple[int, int]:
            peer, got, bucket = 1 - ctx.rank, np.empty(numel, np.float32), np.ones(1000, np.float32)
            sent = ctx.isend(message(ctx.rank, peer, 0, numel), peer)
            received = ctx.irecv(got, peer)
            if ctx.rank == 0:
                received.wait(20)  # rank 1's all-reduce waits here, and its messages move meanwhile
            work = ctx.allreduce(bucket, async_op=True)
            assert work is not None
            for each in (work, sent, received):
                each.wait(20)
            return work.wire_nbytes, ctx.counters()["wire_tx_bytes"]

        for own, everything in run_ranks(body, contexts):
            assert 4 * 1000 <= own < 2 * 4 * 1000
            assert everything > 4 * numel


def test_two_ranks_need_no_third(ranks: list[Context]) -> None:
    """The others are in no call; and asynchronous collectives that wait for them hold nothing up."""
    release, passed = threading.Event(), threading.Barrier(2)

    def body(ctx: Context) -> None:
        last = ctx.world_size - 1
        if ctx.rank not in (0, last):
            assert release.wait(20)
        t = np.ones(1000, np.float32)
        work = ctx.allreduce(t, async_op=True)
        assert work is not None
        if ctx.rank in (0, last):
            peer, got = last - ctx.rank, np.empty(300_000, np.float32)
            sent = ctx.isend(message(ctx.rank, peer, 0, 300_000), peer)
            ctx.recv(got, peer)
            assert sent.wait(20)
            assert not work.is_completed() or ctx.world_size == 2
            passed.wait(20)
            release.set()
        assert work.wait(20)
        assert (t == ctx.world_size).all()

    run_ranks(body, ranks)


def test_closing_delivers_what_was_sent() -> None:
    with engine_contexts(NAMED["2x2"]) as contexts:

        def body(rank: int) -> None:
            ctx = contexts[rank]
            if rank < 3:
                for tag in range(12):
                    ctx.send(message(rank, 3, tag, 15_000), 3, tag)
                ctx.close()
                return
            time.sleep(0.3)
            for src, tag in permutations(range(3), 2):
                got = np.empty(15_000, np.float32)
                ctx.recv(got, src, tag)
                assert got.tobytes() == message(src, 3, tag, 15_000).tobytes()

        assert each_rank(body, 4) == [None] * 4
