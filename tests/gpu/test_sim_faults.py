"""Errors that a test plants, aborts, and communicators that do not block: what is stuck, what is told, what goes on."""

from __future__ import annotations

import ctypes
import functools
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.gpu.sim_device import Device, in_threads
from tests.gpu.sim_nccl import (
    IN_PROGRESS,
    REMOTE_ERROR,
    SUCCESS,
    UNHANDLED_CUDA_ERROR,
    Communicator,
    UniqueId,
    unique_id,
    until,
)
from tests.gpu.simulated import Fault, Simulation

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("gpu-sim"),  # one build serves all
]

EAGER, SEEDS, RANKS = (0, 60, 97), range(8), 2
ILLEGAL_ADDRESS, NOT_READY, LAUNCH_FAILED = 700, 600, 719


@pytest.fixture
def sim() -> Iterator[Simulation]:
    with Simulation() as made:
        yield made
        made.patience(60_000)


@dataclass(kw_only=True)
class Rank:
    """A rank with a communicator, a stream, a value in device memory and an event behind what it has called."""

    sim: Simulation
    number: int
    identity: UniqueId
    blocking: bool = True
    ranks: int = RANKS
    device: Device = field(init=False)

    def __post_init__(self) -> None:
        self.device = Device(self.number)
        self.stream, self.event = self.device.stream(), self.device.event()
        self.values = np.full(16, 1.0 + self.number, np.float32)
        self.sim.adopt(self.values, self.number)
        self.comm = Communicator.join(self.identity, self.ranks, self.number, blocking=self.blocking)
        assert self.comm.settle() == SUCCESS

    def reduce(self) -> int:
        code = self.comm.all_reduce(self.values, self.stream)
        self.device.call("cuEventRecord", self.event, self.stream)
        return code

    def ready(self) -> bool:
        code = self.device.cuda.cuEventQuery(self.event)
        assert code in (0, NOT_READY)
        return bool(code == 0)

    def wait(self) -> int:
        return int(self.device.cuda.cuStreamSynchronize(self.stream))

    def end(self) -> None:
        self.sim.drop(self.values)
        self.device.call("cuEventDestroy_v2", self.event)
        self.device.end(self.stream)


def rounds(
    sim: Simulation, rank: Callable[[int, UniqueId], None], plant: Callable[[], None] = lambda: None
) -> Iterator[list[str]]:
    """Reports of rounds of two ranks, under several orders."""
    for eager in EAGER:
        for seed in SEEDS:
            sim.reset(seed, eager, RANKS)
            plant()
            in_threads(RANKS, functools.partial(rank, identity=unique_id()))
            yield sim.finish()


@pytest.mark.parametrize("fault", [Fault.SYSTEM_ERROR, Fault.INTERNAL_ERROR, Fault.REMOTE_ERROR])
def test_an_error_is_told_to_its_rank_and_to_some_peers(sim: Simulation, fault: Fault) -> None:
    """The operation before is right; the one that it befalls is stuck on all ranks until each has aborted."""
    heard: set[int] = set()

    def rank(number: int, identity: UniqueId) -> None:
        own = Rank(sim=sim, number=number, identity=identity)
        assert own.reduce() == SUCCESS
        assert own.wait() == 0
        assert (own.values == 3.0).all()
        assert own.reduce() == SUCCESS
        if number == 0:
            assert until(lambda: own.comm.state() != SUCCESS)
            assert own.comm.state() == fault
            assert not own.ready()
            assert own.comm.all_reduce(own.values, own.stream) == fault
        else:
            until(lambda: own.comm.state() != SUCCESS, 300)
            assert not own.ready()
            heard.add(own.comm.state())
        assert own.comm.abort() == SUCCESS
        assert own.wait() == 0
        assert np.isnan(own.values).all()
        own.end()

    def plant() -> None:
        sim.inject(fault, device=0, communicator=0, operation=1)

    for lines in rounds(sim, rank, plant):
        assert lines == []
    assert heard == {SUCCESS, REMOTE_ERROR}


def test_a_network_that_hangs_tells_nobody(sim: Simulation) -> None:
    """While somebody asks, it is no standstill; an abort of one rank alone frees that rank alone."""
    barrier = threading.Barrier(RANKS)

    def rank(number: int, identity: UniqueId) -> None:
        own = Rank(sim=sim, number=number, identity=identity)
        assert own.reduce() == SUCCESS
        assert not until(own.ready, 100)
        assert own.comm.state() == SUCCESS
        barrier.wait()
        if number == 0:
            assert own.comm.abort() == SUCCESS
            assert own.wait() == 0
        barrier.wait()
        if number == 1:
            assert not until(own.ready, 100)
            assert own.comm.state() in (SUCCESS, REMOTE_ERROR)
            assert own.comm.abort() == SUCCESS
            assert own.wait() == 0
        own.end()

    def plant() -> None:
        sim.inject(Fault.HANGS, device=1, communicator=0, operation=0)

    for lines in rounds(sim, rank, plant):
        assert lines == []


def test_waiting_for_what_hangs_is_a_standstill(sim: Simulation) -> None:
    """Named by what has begun, and the waits fail."""

    def rank(number: int, identity: UniqueId) -> None:
        own = Rank(sim=sim, number=number, identity=identity)
        own.reduce()
        assert own.wait() == LAUNCH_FAILED
        own.comm.abort()
        own.wait()
        own.end()

    def plant() -> None:
        sim.inject(Fault.HANGS, device=1, communicator=0, operation=0)

    for lines in rounds(sim, rank, plant):
        assert lines
        assert all(line.startswith("deadlock: every host thread waits") for line in lines)
        assert "ncclAllReduce of 16 of type 7 by rank 0 on device 0 has begun" in lines[0]


def test_asking_for_ever_comes_to_an_end(sim: Simulation) -> None:
    """By real time, as whoever asks might do something else yet."""
    sim.reset(1, 0, RANKS)
    sim.patience(200)
    sim.inject(Fault.HANGS, device=0, communicator=0, operation=0)

    def rank(number: int, identity: UniqueId) -> None:
        own = Rank(sim=sim, number=number, identity=identity)
        own.reduce()
        while (code := own.device.cuda.cuEventQuery(own.event)) == NOT_READY:
            pass
        assert code == LAUNCH_FAILED
        own.comm.abort()

    in_threads(RANKS, functools.partial(rank, identity=unique_id()))
    assert sim.finish()[0].startswith("deadlock: nothing has moved for 200 ms: ncclAllReduce")


def test_a_lost_context_answers_every_call_with_an_error(sim: Simulation) -> None:
    """And its peer is stuck, or hears of it."""
    heard: set[int] = set()

    def rank(number: int, identity: UniqueId) -> None:
        own = Rank(sim=sim, number=number, identity=identity)
        assert own.comm.all_reduce(own.values, own.stream) == SUCCESS
        if number == 0:
            assert own.wait() == ILLEGAL_ADDRESS
            for name in ("cuEventRecord", "cuStreamWaitEvent"):
                given = (own.event, own.stream) if name == "cuEventRecord" else (own.stream, own.event, 0)
                assert getattr(own.device.cuda, name)(*given) == ILLEGAL_ADDRESS
            assert own.device.cuda.cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(8)) == 700
            assert own.comm.state() == UNHANDLED_CUDA_ERROR
            assert own.comm.all_reduce(own.values, own.stream) == UNHANDLED_CUDA_ERROR
            assert own.comm.abort() == UNHANDLED_CUDA_ERROR
            sim.drop(own.values)
            return
        until(lambda: own.comm.state() != SUCCESS, 300)
        assert own.device.cuda.cuStreamQuery(own.stream) == NOT_READY
        heard.add(own.comm.state())
        assert own.comm.abort() == SUCCESS
        assert own.wait() == 0
        own.end()

    def plant() -> None:
        sim.inject(Fault.BREAKS, device=0, communicator=0, operation=0)

    for lines in rounds(sim, rank, plant):
        assert lines == []
    assert heard == {SUCCESS, REMOTE_ERROR}


def test_a_context_is_lost_behind_so_many_operations(sim: Simulation) -> None:
    """What has run has run; what is queued never does."""

    def rank(number: int, identity: UniqueId) -> None:
        device = Device(number)
        stream, values = device.stream(), np.zeros(8, np.uint8)
        sim.adopt(values, number)
        for turn in range(3):
            given = ctypes.c_uint64(values.ctypes.data), ctypes.c_ubyte(turn + 1), ctypes.c_size_t(8), stream
            code = device.cuda.cuMemsetD8Async(*given)
            assert code in ((0,) if turn < 2 or number == 1 else (0, ILLEGAL_ADDRESS))
        assert device.cuda.cuStreamSynchronize(stream) == (ILLEGAL_ADDRESS if number == 0 else 0)
        assert values[0] == (2 if number == 0 else 3)
        sim.drop(values)
        if number == 1:
            device.end(stream)

    for lines in rounds(sim, rank, lambda: sim.inject(Fault.BREAKS, device=0, operation=2)):
        assert lines == []


def test_a_communicator_that_does_not_block_has_to_be_asked(sim: Simulation) -> None:
    """What was called is enqueued no sooner. Some calls are done at once."""
    codes: set[int] = set()

    def rank(number: int, identity: UniqueId, bug: str) -> None:
        own = Rank(sim=sim, number=number, identity=identity, blocking=False)
        child = own.comm.split(0, number)
        for comm in (own.comm, child):
            code = comm.all_reduce(own.values, own.stream)
            codes.add(code)
            assert code in (SUCCESS, IN_PROGRESS)
            if bug == "never asked":
                own.wait()
            if bug == "called again" and code == IN_PROGRESS:
                comm.all_reduce(own.values, own.stream)
            assert comm.settle() == SUCCESS
            if bug == "never asked":
                sim.host_access(own.values, write=False, what="reading")
        assert own.wait() == 0
        if not bug:
            assert (own.values == 6.0).all()
        for comm in (child, own.comm):
            comm.destroy()
        own.end()

    for lines in rounds(sim, functools.partial(rank, bug="")):
        assert lines == []
    assert codes == {SUCCESS, IN_PROGRESS}
    for bug, message in (
        ("never asked", "race: "),
        ("called again", "misuse: a call on a communicator that is still"),
    ):
        found = list(rounds(sim, functools.partial(rank, bug=bug)))
        assert any(any(line.startswith(message) for line in lines) for lines in found), bug


@pytest.mark.parametrize("call", ["ncclCommDestroy", "ncclCommFinalize"])
def test_a_communicator_is_ended_when_its_work_has_been_waited_for(sim: Simulation, call: str) -> None:
    def rank(number: int, identity: UniqueId, waits: bool) -> None:
        own = Rank(sim=sim, number=number, identity=identity)
        own.reduce()
        if waits:
            own.wait()
        own.comm.call(call)
        own.wait()
        if call == "ncclCommFinalize":
            own.comm.destroy()
        own.end()

    misuse = f"misuse: {call} while operations are queued that nobody has waited for"
    for waits in (True, False):
        for lines in rounds(sim, functools.partial(rank, waits=waits)):
            assert lines == ([] if waits else [misuse])


def test_threads_of_a_device_may_share_what_they_know(sim: Simulation) -> None:
    """Where one thread waits and another acts on it: a race, unless somebody has said that they are ordered."""

    def work(shared: bool) -> list[str]:
        sim.reset(1, 60, 2)
        if shared:
            sim.share_hosts()
        values, waited = np.zeros(8, np.uint8), threading.Event()
        sim.adopt(values, 0)

        def thread(number: int) -> None:
            device = Device(0)
            if number == 0:
                stream = device.stream()
                given = ctypes.c_uint64(values.ctypes.data), ctypes.c_ubyte(1), ctypes.c_size_t(8), stream
                device.call("cuMemsetD8Async", *given)
                device.wait(stream)
                device.end(stream)
                waited.set()
            else:
                waited.wait()
                sim.host_access(values, write=False, what="reading")

        in_threads(2, thread)
        return sim.finish()

    assert work(shared=True) == []
    assert work(shared=False) == ["race: host: reading (reads) is not ordered after cuMemsetD8Async (writes)"]
