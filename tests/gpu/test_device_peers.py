"""A rank that waits for its GPU alone, its host idle, hears at once of a peer that gives up or is gone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch

from hybridcomm.errors import AbortedError, PeerLostError
from hybridcomm.topology import Topology
from tests.gpu.broker import Broker
from tests.gpu.device_ranks import Rank, run_devices
from tests.gpu.simulation import library
from tests.rank_processes import rank_processes

pytestmark = pytest.mark.xdist_group("gpu-engine")

WATCH_S = 0.05
STALL_S = 30.0
"""After which a rank that has heard nothing ends by itself."""


def waits(rank: Rank, gives_up: Callable[[], None]) -> tuple[str, str, float]:
    """What ends the wait for an all-reduce that rank 2 does not come to, and after how many seconds; rank 2 gives up,
    and its own GPU has nothing to do."""
    begin = time.monotonic()
    tensor = rank.upload(torch.ones(4096))
    try:
        rank.host.barrier()  # which a rank may still be in when it hears of it
        if rank.rank == 2:
            time.sleep(0.2)  # the others are in their all-reduce
            gives_up()
        work = None if rank.rank == 2 else rank.device.allreduce(tensor, async_op=True)
        while work is None or not work.is_completed():
            rank.device._engine.check()
            time.sleep(0.005)
    except (AbortedError, PeerLostError) as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "nothing", "", time.monotonic() - begin


@pytest.mark.parametrize("nodes", [(1, 1, 1), (3,)], ids=["three nodes", "one node"])
def test_an_abort_of_a_host_is_heard_by_ranks_that_wait_for_their_devices(nodes: tuple[int, ...]) -> None:
    """Whichever of NCCL and the host tells a rank first: it is the aborting rank that is named."""

    def body(rank: Rank) -> tuple[str, str, float]:
        return waits(rank, rank.host._engine.abort)

    results, _ = run_devices(
        Topology.from_sizes(nodes), body, watch=WATCH_S, stall_s=STALL_S, return_exceptions=True
    )
    for kind, text, _ in results:
        assert kind == "AbortedError", results
        assert "rank 2" in text or "on this rank" in text, results
    assert max(seconds for _, _, seconds in results) < STALL_S, results


def test_a_failed_collective_of_the_host_ends_what_waits_on_the_device() -> None:
    """On the rank itself, too: its own host's error, which no call of the device asks for."""

    def body(rank: Rank) -> tuple[str, str, float]:
        def gives_up() -> None:
            rank.host._engine.abort()
            with pytest.raises(AbortedError):
                rank.host.barrier()

        return waits(rank, gives_up)

    results, _ = run_devices(
        Topology.virtual(3, 1), body, watch=WATCH_S, stall_s=STALL_S, return_exceptions=True
    )
    assert [kind for kind, _, _ in results] == ["AbortedError"] * 3, results
    assert max(seconds for _, _, seconds in results) < STALL_S, results


def test_without_an_abort_nobody_hears_of_one() -> None:
    """The control: hosts that are idle, in calls, and busy with messages, while the watchdogs look."""

    def body(rank: Rank) -> list[str]:
        tensor, small = rank.upload(torch.ones(4096)), torch.ones(4)
        for _ in range(20):
            rank.device.allreduce(tensor, op="max")
            rank.host.allreduce(small, op="max")
            sent = rank.host.isend(small, (rank.rank + 1) % 3)
            rank.host.recv(torch.empty(4), (rank.rank - 1) % 3)
            sent.wait()
            time.sleep(0.002)
        rank.torch.synchronize()
        return [] if torch.equal(rank.download(tensor), torch.ones(4096)) else ["value"]

    results, reports = run_devices(Topology.virtual(3, 1), body, watch=0.001, stall_s=STALL_S)
    assert results == [[]] * 3
    assert reports == []


KILLED = """
import os, sys, time
import torch
import hybridcomm
from hybridcomm.errors import HybridCommError
from tests.gpu.simulated import Simulation
from tests.gpu.simulated_torch import SimulatedTorch

host = hybridcomm.init(timeout=60)
simulation = Simulation(seed=host.rank, eager_percent=60, threads=0)
simulation.nccl_version(21805)
simulation.patience(50000)
with simulation:
    simulation.share_hosts()
    provider = SimulatedTorch(simulation, 0)
    device = host.connect_device(provider=provider, watch=0.05)
    tensor = provider.upload(torch.ones(4096))
    if host.rank == 2:
        print("ready", flush=True)
        time.sleep(60)
    try:
        work = device.allreduce(tensor, async_op=True)
        print("ready", flush=True)
        while not work.is_completed():
            time.sleep(0.005)
    except HybridCommError as error:
        print(type(error).__name__, error.rank, flush=True)
    os._exit(0)
"""


def test_a_rank_that_is_killed_is_named_by_those_that_wait_for_their_devices() -> None:
    with Broker() as broker:
        env = {
            **dict.fromkeys(("HYBRIDCOMM_CUDA", "HYBRIDCOMM_NCCL", "HYBRIDCOMM_SIM"), str(library())),
            "HYBRIDCOMM_SIM_BROKER": broker.path,
        }
        with rank_processes(KILLED, 3, nodes=3, env=env) as ranks:
            for rank in range(3):
                ranks.wait_for(rank, "ready")
            os.kill(ranks.processes[2].pid, signal.SIGKILL)
            assert ranks.wait(30.0, but=[2])[:2] == [0, 0], "within half of their timeout"
            assert [ranks.log(rank).splitlines()[-1] for rank in (0, 1)] == ["PeerLostError 2"] * 2
