"""Point-to-point messages that cannot come: what is wrong is said on every rank, with the peer's name."""

from __future__ import annotations

import time

import numpy as np
import pytest

import hybridcomm
from hybridcomm.errors import GroupError, PeerLostError, PlanMismatchError, StallError, UnsupportedError
from hybridcomm.point_to_point import P2POp, batch_isend_irecv
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts
from tests.hybridcomm.strategies import NAMED


@pytest.mark.parametrize("peer", [1, 3])
def test_a_missing_peer_is_named_at_the_timeout(peer: int) -> None:
    with engine_contexts(NAMED["2x2"], timeout=1.0) as contexts:

        def body(rank: int) -> None:
            if rank != 0:
                time.sleep(0.5)
                return
            begin = time.monotonic()
            with pytest.raises(StallError, match=rf"receiving a message with tag 9 .* rank {peer}") as caught:
                contexts[0].recv(np.empty(10, np.float32), peer, 9)
            assert caught.value.missing == (peer,)
            assert time.monotonic() - begin < 10
            with pytest.raises(StallError):
                contexts[0].isend(np.empty(10, np.float32), peer)

        assert each_rank(body, 4) == [None] * 4


@pytest.mark.parametrize("peer", [1, 3])
def test_a_peer_that_has_left_is_named(peer: int) -> None:
    with engine_contexts(NAMED["2x2"]) as contexts:

        def body(rank: int) -> None:
            ctx = contexts[rank]
            if rank == peer:
                ctx.send(np.ones(3, np.float32), 0, 1)
                ctx.close()
            elif rank == 0:
                got = np.zeros(3, np.float32)
                ctx.recv(got, peer, 1)
                assert (got == 1).all(), "what came before the end counts"
                with pytest.raises(PeerLostError, match=rf"rank {peer} has closed .* tag 2") as caught:
                    ctx.recv(got, peer, 2)
                assert caught.value.rank == peer

        assert each_rank(body, 4) == [None] * 4


@pytest.mark.parametrize("numel", [4, 100_000])
@pytest.mark.parametrize("peer", [1, 3])
def test_another_size_is_a_mismatch_that_names_both(peer: int, numel: int) -> None:
    with engine_contexts(NAMED["2x2"]) as contexts:

        def body(rank: int) -> None:
            if rank == 0:
                contexts[0].isend(np.zeros(numel, np.float32), peer, 2)
                time.sleep(1.0)
            if rank == peer:
                text = rf"rank 0 sends a message with tag 2 of {numel} float32, .* {numel} int32"
                with pytest.raises(PlanMismatchError, match=text):
                    contexts[rank].recv(np.zeros(numel, np.int32), 0, 2)

        assert each_rank(body, 4) == [None] * 4


@pytest.mark.parametrize("peer", [1, 3])
def test_every_open_work_ends_with_a_mismatch(peer: int) -> None:
    """The one whose message it is, those started with it, and those of before."""
    with engine_contexts(NAMED["2x2"]) as contexts:

        def body(rank: int) -> None:
            ctx = contexts[rank]
            if rank == 0:
                ctx.send(np.zeros(4, np.float32), peer, 2)
            elif rank == peer:
                before = ctx.irecv(np.zeros(4, np.float32), 0, 1)
                time.sleep(0.2)
                ops = [P2POp(hybridcomm.irecv, np.zeros(4, np.int32), 0, ctx, tag) for tag in (2, 3)]
                (batch,) = batch_isend_irecv(ops)
                for work in (before, batch):
                    with pytest.raises(PlanMismatchError, match="rank 0 sends a message with tag 2"):
                        work.wait(10)

        assert each_rank(body, 4) == [None] * 4


def test_refusals() -> None:
    with engine_contexts(Topology.virtual(1, 2)) as contexts:
        ctx, t = contexts[0], np.zeros(3, np.float32)
        with pytest.raises(UnsupportedError, match="timing"):
            ctx.recv(t, None)
        with pytest.raises(UnsupportedError, match="tag"):
            ctx.isend(t, 1, -1)
        with pytest.raises(UnsupportedError, match="itself"):
            ctx.send(t, 0)
        with pytest.raises(GroupError, match=r"rank 2 .* 0\.\.1"):
            ctx.irecv(t, 2)
        with pytest.raises(UnsupportedError, match="isend"):
            P2POp(sum, t, 1, ctx)
        assert batch_isend_irecv([]) == []
