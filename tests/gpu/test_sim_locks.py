"""The simulation's lock and the interpreter's: kernels of Python run under both, and nobody waits in a circle."""

from __future__ import annotations

import ctypes
import functools
import gc
import shutil
import threading
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest

from tests.gpu.sim_device import Device, in_threads
from tests.gpu.sim_nccl import SUCCESS, Communicator, UniqueId, unique_id
from tests.gpu.sim_ranks import Encode
from tests.gpu.simulated import Simulation, sim_library

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("gpu-sim"),  # one build serves all
    pytest.mark.timeout(60),
]


@pytest.fixture
def sim() -> Iterator[Simulation]:
    with Simulation() as made:
        made.register_shipped_kernels()
        yield made


class Cyclic:
    """Garbage whose finalizer calls the driver."""

    ended: ClassVar[list[int]] = []

    def __init__(self, device: Device) -> None:
        self.device, self.own, self.made = device, self, device.event()

    def __del__(self) -> None:
        self.ended.append(sim_library().cuEventDestroy_v2(self.made))


def test_finalizers_that_call_the_driver_do_not_run_in_kernels(sim: Simulation) -> None:
    """Garbage waits for the round's end, whatever is made meanwhile, and what it holds is no leak."""
    Cyclic.ended.clear()

    def rank(number: int) -> None:
        made = Encode(sim, number)
        stream = made.device.stream()
        for _ in range(20):
            Cyclic(made.device)
            rubbish = [[] for _ in range(2000)]  # enough to have garbage collected
            assert made.launch(stream) == len(rubbish) - 2000
            made.device.wait(stream)
        made.drop(sim)
        made.device.end(stream)

    sim.reset(1, 60, 4)
    in_threads(4, rank)
    assert Cyclic.ended == []
    assert sim.finish() == []
    assert Cyclic.ended == [0] * 80


def test_garbage_is_collected_again_when_the_simulation_is_left() -> None:
    assert gc.isenabled()
    with Simulation():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_ranks_that_compute_let_kernels_of_others_run(sim: Simulation) -> None:
    """Some threads have the interpreter's lock most of the time, others wait for their streams and collectives."""
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(1000))

    def rank(number: int, identity: UniqueId) -> None:
        made = Encode(sim, number)
        stream, comm = made.device.stream(), Communicator.join(identity, 4, number)
        values = np.ones(1024, np.float32)
        sim.adopt(values, number)
        for _ in range(5):
            assert made.launch(stream) == 0
            assert comm.all_reduce(values, stream) == SUCCESS
            made.device.wait(stream)
        assert (values == 4.0**5).all()
        comm.destroy()
        sim.drop(values)
        made.drop(sim)
        made.device.end(stream)

    busy = [threading.Thread(target=compute) for _ in range(2)]
    for each in busy:
        each.start()
    try:
        for seed in range(3):
            sim.reset(seed, 60, 4)
            in_threads(4, functools.partial(rank, identity=unique_id()))
            assert sim.finish() == []
    finally:
        stop.set()
        for each in busy:
            each.join()


def test_errors_have_names(sim: Simulation) -> None:
    """As the engine tells them."""
    word = ctypes.c_char_p()
    for code, name in ((0, b"CUDA_SUCCESS"), (700, b"CUDA_ERROR_ILLEGAL_ADDRESS"), (905, None)):
        assert sim_library().cuGetErrorName(code, ctypes.byref(word)) == 0
        assert word.value == (name or b"CUDA_ERROR_STREAM_CAPTURE_ISOLATION")
    assert sim_library().cuGetErrorName(12345, ctypes.byref(word)) == 1
    sim_library().ncclGetErrorString.restype = ctypes.c_char_p
    assert sim_library().ncclGetErrorString(5) == b"invalid usage"
    assert sim.finish() == []
