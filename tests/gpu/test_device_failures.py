"""What goes wrong on simulated GPUs ends with a typed error on every rank, and no rank hangs."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from hybridcomm.errors import AbortedError, HybridCommError, PeerLostError, StallError
from hybridcomm.topology import Topology
from tests.gpu.device_ranks import Rank, run_devices
from tests.gpu.simulated import Fault

pytestmark = pytest.mark.xdist_group("gpu-engine")

STALL_S = 3.0


def failing(fault: Fault | None, *, absent: bool = False) -> Callable[[Rank], list[type[BaseException]]]:
    """The types of what two all-reduces raise; from the second one on rank 1's device has a fault, or it is absent."""

    def reduce(rank: Rank) -> None:
        tensor = rank.upload(torch.ones(1 << 14))
        work = rank.device.allreduce(tensor, compress="topk:0.01", async_op=True)
        work.synchronize()

    def body(rank: Rank) -> list[type[BaseException]]:
        reduce(rank)
        if rank.rank == 1 and fault is not None:
            rank.torch.simulation.inject(fault, device=1, communicator=0, operation=1)
        rank.host.barrier()
        raised: list[type[BaseException]] = []
        for _ in range(2):  # the second call must raise at once
            if absent and rank.rank == 1:
                time.sleep(STALL_S)
                continue
            try:
                reduce(rank)
            except HybridCommError as error:
                raised.append(type(error))
        return raised

    return body


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        (Fault.HANGS, {StallError, PeerLostError, AbortedError}),
        (Fault.REMOTE_ERROR, {StallError, PeerLostError, AbortedError}),
        (Fault.SYSTEM_ERROR, {StallError, PeerLostError, AbortedError}),
        (Fault.INTERNAL_ERROR, {StallError, PeerLostError, AbortedError}),
    ],
)
def test_a_broken_network_raises_on_every_rank(fault: Fault, kinds: set[type[BaseException]]) -> None:
    results, _ = run_devices(
        Topology.virtual(2, 1), failing(fault), watch=0.05, stall_s=STALL_S, return_exceptions=True
    )
    for raised in results:
        assert len(raised) == 2, results
        assert set(raised) <= kinds, results


def test_a_rank_that_does_not_come_is_a_stall() -> None:
    results, _ = run_devices(
        Topology.virtual(2, 1),
        failing(None, absent=True),
        watch=0.05,
        stall_s=STALL_S,
        return_exceptions=True,
    )
    assert results[0][0] is StallError


def test_without_a_fault_nothing_is_raised() -> None:
    """The control: the same calls."""
    results, reports = run_devices(Topology.virtual(2, 1), failing(None), watch=0.05, stall_s=STALL_S)
    assert results == [[], []]
    assert reports == []


def test_an_abort_ends_the_others_calls() -> None:
    def body(rank: Rank) -> str:
        tensor = rank.upload(torch.ones(4096))
        if rank.rank == 1:
            rank.device.abort()
        try:
            for _ in range(2):
                rank.device.allreduce(tensor, async_op=True).synchronize()
        except HybridCommError as error:
            return type(error).__name__
        return "nothing"

    results, _ = run_devices(
        Topology.virtual(2, 1), body, watch=0.05, stall_s=STALL_S, return_exceptions=True
    )
    assert results[1] == "AbortedError"
    assert results[0] in ("AbortedError", "PeerLostError", "StallError")
