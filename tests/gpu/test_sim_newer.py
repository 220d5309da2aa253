"""What NCCL got after 2.18: refused where the version says so, else registrations, windows, all-to-all, shrinking."""

from __future__ import annotations

import ctypes
import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.gpu.sim_device import Device, in_threads
from tests.gpu.sim_nccl import (
    FLOAT32,
    INVALID_USAGE,
    SUCCESS,
    Communicator,
    UniqueId,
    unique_id,
)
from tests.gpu.simulated import Fault, Simulation, sim_library

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("gpu-sim"),  # one build serves all
]

EAGER, SEEDS, RANKS = (0, 60, 97), range(6), 4
OLDEST, NEWEST = 21805, 22902


@pytest.fixture
def sim() -> Iterator[Simulation]:
    with Simulation() as made:
        made.nccl_version(NEWEST)
        yield made
        made.nccl_version(OLDEST)


def rounds(
    sim: Simulation,
    rank: Callable[[int, UniqueId], None],
    ranks: int = RANKS,
    plant: Callable[[], None] = lambda: None,
) -> Iterator[list[str]]:
    for eager in EAGER:
        for seed in SEEDS:
            sim.reset(seed, eager, ranks)
            plant()
            in_threads(ranks, functools.partial(rank, identity=unique_id()))
            yield sim.finish()


def at(values: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.ctypes.data)


def all_to_all(comm: Communicator, source: Any, target: Any, stream: Any) -> int:
    count = ctypes.c_size_t(source.size // RANKS)
    return int(sim_library().ncclAlltoAll(at(source), at(target), count, FLOAT32, comm.handle, stream))


@pytest.mark.parametrize("bug", ["", "short target"])
def test_all_to_all_moves_a_piece_from_each_to_each(sim: Simulation, bug: str) -> None:
    def rank(number: int, identity: UniqueId) -> None:
        device = Device(number)
        stream = device.stream()
        comm = Communicator.join(identity, RANKS, number)
        source = np.repeat(np.arange(RANKS, dtype=np.float32) + 10 * number, 3)
        target = np.zeros(source.size - (bug == "short target"), np.float32)
        for each in (source, target):
            sim.adopt(each, number)
        assert all_to_all(comm, source, target, stream) == SUCCESS
        device.wait(stream)
        if not bug:
            assert (target == np.repeat(10.0 * np.arange(RANKS) + number, 3)).all()
        comm.destroy()
        for each in (source, target):
            sim.drop(each)
        device.end(stream)

    for lines in rounds(sim, rank):
        assert bool(lines) == bool(bug)
        assert all(line.startswith("bounds: ncclAlltoAll of 3 of type 7 by rank") for line in lines)


def test_an_older_version_has_none_of_it(sim: Simulation) -> None:
    """Whoever calls what the version does not announce is told."""
    said = ctypes.c_int()
    sim.nccl_version(OLDEST)
    sim_library().ncclGetVersion(ctypes.byref(said))
    assert said.value == OLDEST

    def rank(number: int, identity: UniqueId) -> None:
        device = Device(number)
        comm = Communicator.join(identity, 1, number)
        values, out = np.zeros(RANKS, np.float32), ctypes.c_void_p()
        sim.adopt(values, number)
        library, whole = sim_library(), ctypes.c_size_t(16)
        assert all_to_all(comm, values, values, None) == INVALID_USAGE
        assert library.ncclMemAlloc(ctypes.byref(out), whole) == INVALID_USAGE
        assert comm.call("ncclCommRegister", at(values), whole, ctypes.byref(out)) == INVALID_USAGE
        assert comm.call("ncclCommWindowRegister", at(values), whole, ctypes.byref(out), 0) == INVALID_USAGE
        assert comm.call("ncclCommShrink", None, 0, ctypes.byref(out), None, 0) == INVALID_USAGE
        assert comm.call("ncclCommRevoke", 0) == INVALID_USAGE
        scalable = library.ncclCommInitRankScalable
        assert scalable(ctypes.byref(out), 1, 0, 1, ctypes.byref(identity), None) == INVALID_USAGE
        comm.destroy()
        sim.drop(values)
        assert device.ordinal == number

    sim.reset(1, 0, 1)
    in_threads(1, functools.partial(rank, identity=unique_id()))
    lines = sim.finish()
    assert len(lines) == 7
    assert all(line.endswith("the version that ncclGetVersion says has none") for line in lines)


BUGS = {
    "": "",
    "left": "leak: 1 registered buffers",
    "freed first": "freed: a registered buffer was freed before it was deregistered",
    "host memory": "stranger: a buffer to register that is no device memory",
    "twice": "stranger: a registration that is none",
}


@pytest.mark.parametrize("window", [False, True], ids=["buffer", "window"])
@pytest.mark.parametrize("bug", BUGS)
def test_registered_memory_is_forgotten_before_it_is_freed(sim: Simulation, bug: str, window: bool) -> None:
    name = "ncclCommWindow{}" if window else "ncclComm{}"

    def rank(number: int, identity: UniqueId) -> None:
        device, memory, handle = Device(number), ctypes.c_void_p(), ctypes.c_void_p()
        comm = Communicator.join(identity, 2, number)
        whole = ctypes.c_size_t(64)
        assert sim_library().ncclMemAlloc(ctypes.byref(memory), whole) == SUCCESS
        stray = bug == "host memory"
        host = np.zeros(64, np.uint8)
        given = (at(host) if stray else memory, whole, ctypes.byref(handle), *([0] if window else []))
        assert (comm.call(name.format("Register"), *given) == SUCCESS) == (not stray)
        if bug == "freed first":
            assert sim_library().ncclMemFree(memory) == SUCCESS
        if not stray and not (bug == "left" and number == 0):
            assert comm.call(name.format("Deregister"), handle) == SUCCESS
        if bug == "twice":
            comm.call(name.format("Deregister"), handle)
        if bug != "freed first":
            assert sim_library().ncclMemFree(memory) == SUCCESS
        comm.destroy()
        assert device.ordinal == number

    for lines in rounds(sim, rank, 2):
        assert lines == ([BUGS[bug]] if bug else [])


@pytest.mark.parametrize("by_size", [True, False])
def test_windows_of_different_sizes_or_flags_are_told(sim: Simulation, by_size: bool) -> None:
    def rank(number: int, identity: UniqueId) -> None:
        device, memory, window = Device(number), ctypes.c_void_p(), ctypes.c_void_p()
        assert sim_library().ncclMemAlloc(ctypes.byref(memory), ctypes.c_size_t(64)) == SUCCESS
        comm = Communicator.join(identity, 2, number)
        size, flags = ctypes.c_size_t(64 - 16 * number * by_size), number * (not by_size)
        assert comm.call("ncclCommWindowRegister", memory, size, ctypes.byref(window), flags) == SUCCESS
        assert comm.call("ncclCommWindowDeregister", window) == SUCCESS
        comm.destroy()
        assert sim_library().ncclMemFree(memory) == SUCCESS
        assert device.ordinal == number

    for lines in rounds(sim, rank, 2):
        assert lines == ["mismatch: ncclCommWindowRegister of different sizes or flags"]


@pytest.mark.parametrize("moved", [0, 1])
def test_ranks_use_a_window_at_one_offset(sim: Simulation, moved: int) -> None:
    def rank(number: int, identity: UniqueId) -> None:
        device, memory, window = Device(number), ctypes.c_void_p(), ctypes.c_void_p()
        stream, comm = device.stream(), Communicator.join(identity, 2, number)
        whole = ctypes.c_size_t(64)
        assert sim_library().ncclMemAlloc(ctypes.byref(memory), whole) == SUCCESS
        assert comm.call("ncclCommWindowRegister", memory, whole, ctypes.byref(window), 1) == SUCCESS
        assert device.cuda.cuMemsetD8Async(memory, 0, whole, stream) == 0
        at = ctypes.c_void_p((memory.value or 0) + 16 * number * moved)
        count = ctypes.c_size_t(4)
        assert sim_library().ncclAllReduce(at, at, count, FLOAT32, 0, comm.handle, stream) == SUCCESS
        device.wait(stream)
        assert comm.call("ncclCommWindowDeregister", window) == SUCCESS
        comm.destroy()
        assert sim_library().ncclMemFree(memory) == SUCCESS
        device.end(stream)

    for lines in rounds(sim, rank, 2):
        assert len(lines) == moved
        assert all(line.endswith("at another offset of its window than other ranks") for line in lines)


def test_a_window_is_of_memory_of_nccls_own(sim: Simulation) -> None:
    def rank(number: int, identity: UniqueId) -> None:
        device, values, window = Device(number), np.zeros(64, np.uint8), ctypes.c_void_p()
        sim.adopt(values, number)
        comm = Communicator.join(identity, 2, number)
        whole = ctypes.c_size_t(64)
        assert comm.call("ncclCommWindowRegister", at(values), whole, ctypes.byref(window), 1) != SUCCESS
        assert not window
        comm.destroy()
        sim.drop(values)
        assert device.ordinal == number

    for lines in rounds(sim, rank, 2):
        assert lines == ["misuse: a window of memory that is not ncclMemAlloc's"]


@pytest.mark.parametrize("first", ["abort", "revoke"])
def test_survivors_of_a_lost_rank_shrink_their_world(sim: Simulation, first: str) -> None:
    """By NCCL_SHRINK_ABORT, or revoked before: what was under way is freed, and goes on among three."""
    lost = 2

    def rank(number: int, identity: UniqueId) -> None:
        device = Device(number)
        stream, values = device.stream(), np.full(4, 1.0 + number, np.float32)
        sim.adopt(values, number)
        scalable, handle = sim_library().ncclCommInitRankScalable, ctypes.c_void_p()
        assert scalable(ctypes.byref(handle), RANKS, number, 1, ctypes.byref(identity), None) == SUCCESS
        comm, child = Communicator(handle), ctypes.c_void_p()
        assert comm.all_reduce(values, stream) == SUCCESS
        if number == lost:
            comm.abort()
            device.wait(stream)
            sim.drop(values)
            return device.end(stream)
        if first == "revoke":
            assert comm.call("ncclCommRevoke", 0) == SUCCESS
        gone, flags = (ctypes.c_int * 1)(lost), int(first == "abort")
        assert comm.call("ncclCommShrink", gone, 1, ctypes.byref(child), None, flags) == SUCCESS
        device.wait(stream)
        values[:] = 1.0
        smaller, size = Communicator(child), ctypes.c_int()
        assert smaller.call("ncclCommCount", ctypes.byref(size)) == SUCCESS
        assert size.value == RANKS - 1
        assert smaller.all_reduce(values, stream) == SUCCESS
        device.wait(stream)
        assert (values == 3.0).all()
        for each in (smaller, comm):
            each.destroy()
        sim.drop(values)
        return device.end(stream)

    hangs = functools.partial(sim.inject, Fault.HANGS, device=lost, communicator=0, operation=0)
    for lines in rounds(sim, rank, plant=hangs):
        assert lines == []


@pytest.mark.parametrize("swapped", [False, True])
def test_communicators_of_one_group_follow_each_other_in_its_order(sim: Simulation, swapped: bool) -> None:
    """As in NCCL, which launches a kernel for each. On one stream, ranks with another order come to no end."""

    def rank(number: int, identity: UniqueId) -> None:
        device = Device(number)
        stream, values = device.stream(), np.ones((2, 4), np.float32)
        sim.adopt(values, number)
        comm = Communicator.join(identity, 2, number)
        comms = [comm, comm.split(0, number)]
        sim_library().ncclGroupStart()
        for i in (1, 0) if swapped and number == 1 else (0, 1):
            assert comms[i].all_reduce(values[i], stream) == SUCCESS
        assert sim_library().ncclGroupEnd() == SUCCESS
        code = device.cuda.cuStreamSynchronize(stream)
        if not swapped:
            assert code == 0
            assert (values == 2.0).all()
        for each in comms:
            assert (each.abort() if swapped else each.destroy()) == SUCCESS
        device.wait(stream)
        sim.drop(values)
        device.end(stream)

    for lines in rounds(sim, rank, 2):
        assert bool(lines) == swapped
        assert all(line.startswith("deadlock: ") for line in lines)
