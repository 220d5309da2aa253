"""Connections made when they are first needed: how many there are, in contrary orders, and faults of late peers."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hybridcomm.context import Context
from hybridcomm.errors import PeerLostError, StallError
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts
from tests.rank_processes import rank_processes
from tests.ranks import run_ranks


def sockets() -> int:
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += os.readlink(entry).startswith("socket:")
        except FileNotFoundError:
            continue
    return count


def test_only_owners_are_connected_at_the_start() -> None:
    """4 nodes of 4: 48 pairs of owners with 3 sockets and 2 ends each, not 192 pairs; the rest when needed."""
    before = sockets()
    with engine_contexts(Topology.virtual(4, 4)) as contexts:
        at_start = sockets() - before
        in_nodes, owners, listeners = 4 * 6 * 2, 4 * 6 * 3 * 2, 2 * 16
        assert at_start <= in_nodes + owners + listeners
        run_ranks(lambda ctx: ctx.group([0, 5]).barrier() if ctx.rank in (0, 5) else None, contexts)
        run_ranks(lambda ctx: ctx.group([0, 5]).barrier() if ctx.rank in (0, 5) else None, contexts)
        assert sockets() - before == at_start + 3 * 2, "one link more, made once"


def test_links_in_contrary_orders() -> None:
    """Every pair of ranks of two nodes, all at once: each rank begins with another peer than its peer does."""
    with engine_contexts(Topology.virtual(2, 3)) as contexts:

        def body(ctx: Context) -> None:
            pairs = sorted((a, b) for a in range(3) for b in range(3, 6))
            for call in range(2):
                arrays = [np.full(20_000, a + b + call, np.float32) for a, b in pairs]
                works = [
                    ctx.group(pair).allreduce(array, async_op=True)
                    for pair, array in zip(pairs, arrays, strict=True)
                    if ctx.rank in pair
                ]
                for work in works:
                    assert work is not None
                    work.wait(20)
                for pair, array in zip(pairs, arrays, strict=True):
                    assert (array == (1 + (ctx.rank in pair)) * (sum(pair) + call)).all()

        run_ranks(body, contexts)


def test_a_peer_that_never_connects_is_named() -> None:
    """On both sides of the dial: the higher rank dials in vain, the lower waits for it in vain."""
    for waiting, missing in ((0, 3), (3, 0)):
        with engine_contexts(Topology.virtual(2, 2), timeout=1.0) as contexts:

            def body(rank: int, ctx: Context, waiting: int = waiting, missing: int = missing) -> None:
                if rank != waiting:
                    time.sleep(0.2)
                    return
                with pytest.raises(StallError, match=rf"over ranks 0, 3 on .*rank {missing}\b") as caught:
                    ctx.group([0, 3]).allreduce(np.ones(10))
                assert caught.value.missing == (missing,)

            assert each_rank(lambda rank: body(rank, contexts[rank]), 4) == [None] * 4


@pytest.mark.parametrize("collective", [True, False])
def test_dialling_a_rank_that_is_closed(collective: bool) -> None:
    with engine_contexts(Topology.virtual(2, 2)) as contexts:
        each_rank(lambda rank: contexts[0].close() if rank == 0 else None, 4)

        def body(rank: int) -> None:
            if rank == 3:
                call = contexts[3].group([0, 3]).allreduce if collective else partial(contexts[3].send, dst=0)
                with pytest.raises(PeerLostError, match="rank 0") as caught:
                    call(np.ones(10))
                assert caught.value.rank == 0

        assert each_rank(body, 4) == [None] * 4


WORKER = """
import os, signal, sys, time
import numpy as np
import hybridcomm
from hybridcomm.errors import HybridCommError

ctx = hybridcomm.init(timeout=60)
peer = int(sys.argv[1])
print("ready", flush=True)
big = np.ones(3_000_000, np.float32)
try:
    if ctx.rank == 0:
        for call in range(1_000_000):
            ctx.send(big, peer, call)
            ctx.recv(big, peer, call)
    if ctx.rank == peer:
        for call in range(1_000_000):
            ctx.recv(big, 0, call)
            if call == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            ctx.send(big, 0, call)
    time.sleep(5)
except HybridCommError as error:
    print("ended", type(error).__name__, getattr(error, "rank", None), error, flush=True)
    sys.exit(3)
"""


@pytest.mark.parametrize("peer", [1, 3])
def test_a_killed_peer_is_named(peer: int) -> None:
    """In a node and on another one, to which there is no usual link."""
    with rank_processes(WORKER, 4, nodes=2, args=[str(peer)]) as job:
        codes = job.wait(60.0, but=[rank for rank in range(4) if rank != 0])
        assert codes[0] == 3, job.log(0)
        assert f"ended PeerLostError {peer} rank {peer} is gone" in job.log(0)
