"""Stream capture: what joins, what is refused, and launches that do everything anew."""

from __future__ import annotations

import ctypes
import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.gpu.sim_device import Device, in_threads
from tests.gpu.sim_nccl import SUCCESS, Communicator, UniqueId, unique_id
from tests.gpu.simulated import Simulation

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("gpu-sim"),  # one build serves all
]

EAGER, SEEDS = (0, 60, 97), range(6)
GLOBAL, RELAXED = 0, 2
NONE, ACTIVE, INVALIDATED = 0, 1, 2
UNSUPPORTED, INVALID, MERGE, UNMATCHED, UNJOINED, ISOLATION, IMPLICIT, EVENT = range(900, 908)


@pytest.fixture
def sim() -> Iterator[Simulation]:
    with Simulation() as made:
        yield made


class Capturing(Device):
    """A device with two streams, events and memory; all calls give their codes."""

    def __init__(self, sim: Simulation, ordinal: int) -> None:
        super().__init__(ordinal)
        self.sim, self.values = sim, np.zeros(8, np.uint8)
        self.first, self.second = self.stream(), self.stream()
        self.fork, self.join = self.event(), self.event()
        sim.adopt(self.values, ordinal)

    def code(self, name: str, *given: Any) -> int:
        return int(getattr(self.cuda, name)(*given))

    def set(self, value: int, stream: Any) -> int:
        address = ctypes.c_uint64(self.values.ctypes.data)
        return self.code("cuMemsetD8Async", address, ctypes.c_ubyte(value), ctypes.c_size_t(8), stream)

    def begin(self, stream: Any, mode: int = RELAXED) -> int:
        return self.code("cuStreamBeginCapture_v2", stream, mode)

    def ended(self, stream: Any) -> tuple[int, ctypes.c_void_p]:
        graph = ctypes.c_void_p()
        return self.code("cuStreamEndCapture", stream, ctypes.byref(graph)), graph

    def status(self, stream: Any) -> int:
        status = ctypes.c_int()
        self.call("cuStreamIsCapturing", stream, ctypes.byref(status))
        return status.value

    def record(self, event: Any, stream: Any) -> int:
        return self.code("cuEventRecord", event, stream)

    def after(self, stream: Any, event: Any) -> int:
        return self.code("cuStreamWaitEvent", stream, event, 0)

    def executable(self, graph: ctypes.c_void_p) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.call("cuGraphInstantiateWithFlags", ctypes.byref(made), graph, ctypes.c_ulonglong(0))
        self.call("cuGraphDestroy", graph)
        return made

    def close(self) -> None:
        for stream in (self.first, self.second):
            self.wait(stream)
        self.sim.drop(self.values)
        for event in (self.fork, self.join):
            self.call("cuEventDestroy_v2", event)
        self.end(self.first, self.second)


def rounds(sim: Simulation, rank: Callable[[int], None], threads: int = 1) -> Iterator[list[str]]:
    for eager in EAGER:
        for seed in SEEDS:
            sim.reset(seed, eager, threads)
            in_threads(threads, rank)
            yield sim.finish()


BUGS = {
    "": "",
    "not joined": "",
    "no wait": "race: ",
    "destroyed": "stranger: an executable graph",
    "left": "leak: 1 graphs",
}


@pytest.mark.parametrize("bug", BUGS)
def test_what_is_captured_runs_with_every_launch(sim: Simulation, bug: str) -> None:
    """Over two streams; nothing runs before. Without the wait at the join, the capture cannot end."""

    def rank(number: int) -> None:
        on = Capturing(sim, number)
        assert on.begin(on.first) == 0
        assert on.set(1, on.first) == 0
        assert on.record(on.fork, on.first) == 0
        assert on.after(on.second, on.fork) == 0
        assert on.status(on.second) == ACTIVE
        assert on.set(2, on.second) == 0
        assert on.record(on.join, on.second) == 0
        if bug != "not joined":
            assert on.after(on.first, on.join) == 0
        code, graph = on.ended(on.first)
        assert code == (UNJOINED if bug == "not joined" else 0)
        assert on.status(on.second) == NONE
        if bug == "not joined":
            assert not graph.value
            return on.close()
        on.wait(on.first)
        assert on.values[0] == 0
        graph = on.executable(graph)
        for _ in range(2):
            assert on.set(7, on.second if bug == "no wait" else on.first) == 0
            assert on.code("cuGraphLaunch", graph, on.first) == 0
            on.wait(on.first)
            assert on.values[0] == 2 or bug == "no wait"
        if bug != "left":
            on.call("cuGraphExecDestroy", graph)
        if bug == "destroyed":
            assert on.code("cuGraphLaunch", graph, on.first) == 400
        return on.close()

    for lines in rounds(sim, rank):
        assert bool(lines) == bool(BUGS[bug])
        assert all(line.startswith(BUGS[bug]) for line in lines)


def test_unordered_nodes_race(sim: Simulation) -> None:
    """Two captured streams that both write, joined only at the end."""

    def rank(number: int) -> None:
        on = Capturing(sim, number)
        on.begin(on.first)
        on.record(on.fork, on.first)
        on.after(on.second, on.fork)
        on.set(1, on.first)
        on.set(2, on.second)
        on.record(on.join, on.second)
        on.after(on.first, on.join)
        graph = on.executable(on.ended(on.first)[1])
        on.call("cuGraphLaunch", graph, on.first)
        on.wait(on.first)
        on.call("cuGraphExecDestroy", graph)
        on.close()

    for lines in rounds(sim, rank):
        assert lines == ["race: cuMemsetD8Async (writes) is not ordered after cuMemsetD8Async (writes)"]


FORBIDDEN: dict[str, tuple[int, Callable[[Capturing], int]]] = {
    "an event from outside": (ISOLATION, lambda on: on.after(on.first, on.join)),
    "synchronising": (UNSUPPORTED, lambda on: on.code("cuStreamSynchronize", on.first)),
    "asking": (UNSUPPORTED, lambda on: on.code("cuStreamQuery", on.first)),
    "waiting for a captured event": (EVENT, lambda on: on.code("cuEventSynchronize", on.fork)),
    "asking of a captured event": (EVENT, lambda on: on.code("cuEventQuery", on.fork)),
    "the legacy stream": (UNSUPPORTED, lambda on: on.after(None, on.fork)),
    "a capture of its own": (MERGE, lambda on: on.begin(on.second) or on.after(on.second, on.fork)),
    "another's end": (UNMATCHED, lambda on: on.after(on.second, on.fork) or on.ended(on.second)[0]),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_is_forbidden_spoils_the_capture(sim: Simulation, what: str) -> None:
    code, act = FORBIDDEN[what]

    def rank(number: int) -> None:
        on = Capturing(sim, number)
        on.record(on.join, on.second)
        assert on.begin(on.first) == 0
        assert on.record(on.fork, on.first) == 0
        assert act(on) == code
        assert on.status(on.first) == INVALIDATED
        assert on.set(1, on.first) == INVALID
        assert on.ended(on.first)[0] == INVALID
        if what == "a capture of its own":
            assert on.ended(on.second)[0] == INVALID
        assert on.status(on.first) == on.status(on.second) == NONE
        assert on.set(1, on.first) == 0
        on.close()

    for lines in rounds(sim, rank):
        assert lines == []


@pytest.mark.parametrize("mode", [GLOBAL, RELAXED])
def test_memory_may_be_allocated_while_a_relaxed_capture_is_on(sim: Simulation, mode: int) -> None:
    def rank(number: int) -> None:
        on, pointer = Capturing(sim, number), ctypes.c_uint64()
        assert on.begin(on.first, mode) == 0
        allocated = on.code("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(64))
        assert allocated == (0 if mode == RELAXED else UNSUPPORTED)
        code, graph = on.ended(on.first)
        assert code == (0 if mode == RELAXED else INVALID)
        if mode == RELAXED:
            on.call("cuMemFree_v2", pointer)
            on.call("cuGraphDestroy", graph)
        on.close()

    for lines in rounds(sim, rank):
        assert lines == []


def test_the_legacy_stream_cannot_wait_for_what_is_captured(sim: Simulation) -> None:
    def rank(number: int) -> None:
        on, blocking = Capturing(sim, number), ctypes.c_void_p()
        on.call("cuStreamCreateWithPriority", ctypes.byref(blocking), 0, 0)
        assert on.begin(None) == UNSUPPORTED
        assert on.begin(blocking) == 0
        assert on.begin(blocking) == 401
        assert on.set(1, None) == IMPLICIT
        assert on.ended(blocking)[0] == INVALID
        assert on.ended(blocking)[0] == 401
        on.end(blocking)
        on.close()

    for lines in rounds(sim, rank):
        assert lines == []


@pytest.mark.parametrize("bug", ["", "destroyed first"])
def test_collectives_are_captured(sim: Simulation, bug: str) -> None:
    """Each launch is a call of its own: as often as ranks launch, they meet; what is not captured comes in between."""

    def rank(number: int, identity: UniqueId) -> None:
        on = Capturing(sim, number)
        values = np.zeros(4, np.float32)
        sim.adopt(values, number)
        comm = Communicator.join(identity, 2, number)
        on.begin(on.first)
        assert comm.all_reduce(values, on.first) == SUCCESS
        assert comm.all_reduce(values, on.first) == SUCCESS
        graph = on.executable(on.ended(on.first)[1])
        for turn in range(3):
            sim.host_access(values, write=True, what="filling")
            values[:] = turn + number
            on.call("cuGraphLaunch", graph, on.first)
            assert comm.all_reduce(values, on.first) == SUCCESS
            on.wait(on.first)
            sim.host_access(values, write=False, what="reading")
            assert (values == 4 * (2 * turn + 1)).all()
        comm.destroy()
        if bug:
            on.call("cuGraphLaunch", graph, on.first)
            on.wait(on.first)
        on.call("cuGraphExecDestroy", graph)
        sim.drop(values)
        on.close()

    for eager in EAGER:
        for seed in SEEDS:
            sim.reset(seed, eager, 2)
            in_threads(2, functools.partial(rank, identity=unique_id()))
            lines = sim.finish()
            assert bool(lines) == bool(bug)
            assert all("its communicator was destroyed" in line for line in lines)
