"""A context of a node's ranks beside the job's: its collectives wait for nothing that stands in the other's queue."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from hybridcomm.context import Context
from hybridcomm.errors import StallError
from hybridcomm.groups import Grouping
from hybridcomm.topology import Topology
from tests.engine_ranks import engine_contexts
from tests.ranks import run_ranks

TWO_BY_TWO = Topology.virtual(2, 2)


def pair(ctx: Context) -> Grouping:
    """The ranks of this one's node, in the queue of the job's context."""
    return ctx.group(ctx.topology.nodes[ctx.topology.node_of(ctx.rank)])


def held_up(beside: Callable[[Context], Grouping], patience: float | None) -> None:
    """Node 1 comes to a sum of the whole job only when node 0's ranks have had a sum among themselves behind it."""
    done = [threading.Event(), threading.Event()]

    def body(ctx: Context) -> tuple[float, float]:
        own = beside(ctx)
        bucket, inner = torch.full((100_000,), float(ctx.rank)), torch.full((300,), 1.0 + ctx.rank)
        if ctx.rank < 2:
            work = ctx.allreduce(bucket, async_op=True)
            try:
                own.allreduce(inner, async_op=True).wait(patience)
                assert not work.is_completed()
            finally:
                done[ctx.rank].set()
            work.wait()
        else:
            assert all(event.wait(30) for event in done)
            ctx.allreduce(bucket)
            own.allreduce(inner)
        if isinstance(own, Context):
            own.close()
        return float(bucket[-1]), float(inner[-1])

    with engine_contexts(TWO_BY_TWO) as contexts:
        assert run_ranks(body, contexts) == [(6.0, 3.0), (6.0, 3.0), (6.0, 7.0), (6.0, 7.0)]


def test_a_node_goes_on_while_the_job_waits() -> None:
    held_up(Context.connect_node, None)


def test_control_in_one_queue_it_waits() -> None:
    """What stands behind the held-up sum in the same queue cannot be done, however long one waits."""
    with pytest.raises(StallError, match=r"was not done after 0\.2 s"):
        held_up(pair, 0.2)


@pytest.mark.parametrize("topology", [Topology.from_sizes([3, 1]), Topology(nodes=((0, 3), (1, 2)))])
def test_ranks_are_the_places_on_the_node_and_it_can_be_made_again(topology: Topology) -> None:
    def body(ctx: Context) -> list[float]:
        sums = []
        for _ in range(2):
            with ctx.connect_node() as own:
                assert own.rank == topology.local_rank(ctx.rank)
                assert own.world_size == len(topology.nodes[topology.node_of(ctx.rank)])
                value = torch.tensor([2.0**ctx.rank])
                own.allreduce(value)
                sums.append(float(value))
        return sums

    with engine_contexts(topology) as contexts:
        for rank, sums in enumerate(run_ranks(body, contexts)):
            node = topology.nodes[topology.node_of(rank)]
            assert sums == [sum(2.0**other for other in node)] * 2


def test_the_port_of_the_job_is_not_asked_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """HYBRIDCOMM_PORT is the job's; here it is one that nobody could listen on."""

    def body(ctx: Context) -> float:
        with ctx.connect_node() as own:
            value = torch.ones(1)
            own.allreduce(value)
            return float(value)

    with engine_contexts(TWO_BY_TWO) as contexts:
        monkeypatch.setenv("HYBRIDCOMM_PORT", "70000")
        assert run_ranks(body, contexts) == [2.0] * 4
