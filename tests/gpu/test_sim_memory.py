"""Memory of tensors as device memory: bounds, races with the host's own accesses, use after it was taken back."""

from __future__ import annotations

import ctypes
import functools
import shutil
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from hybridcomm.kernels.cubins.launcher import Launcher
from hybridcomm.kernels.triton import bucket, launch_bucket
from tests.gpu import simulated
from tests.gpu.sim_device import Device, in_threads
from tests.gpu.sim_ranks import Adopting, Encode
from tests.gpu.simulated import Simulation
from tests.gpu.test_twins import flawed

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("gpu-sim"),  # one build serves all
]

EAGER = (0, 60, 97)


@pytest.fixture
def sim() -> Iterator[Simulation]:
    with Simulation() as made:
        made.register_shipped_kernels()
        yield made


def under_all_orders(sim: Simulation, rank: Callable[[int], None], threads: int = 1) -> list[list[str]]:
    """Reports of rounds under several seeds."""
    found = []
    for eager in EAGER:
        for seed in range(8):
            sim.reset(seed, eager, threads)
            in_threads(threads, rank)
            found.append(sim.finish())
    return found


def clear(device: Device, values: np.ndarray, nbytes: int, stream: ctypes.c_void_p, first: int = 0) -> None:
    address = ctypes.c_uint64(values.ctypes.data + first)
    device.call("cuMemsetD8Async", address, ctypes.c_ubyte(1), ctypes.c_size_t(nbytes), stream)


FAULTS = {
    "none": "",
    "no wait": "race: ",
    "bounds": "bounds: cuMemsetD8Async (writes): outside of its allocation",
    "before": "stranger: cuMemsetD8Async (writes): no device memory",
    "dropped": "freed: cuMemsetD8Async (writes): after sim_drop",
    "dropped early": "freed: ",
    "device": "stranger: cuMemsetD8Async (writes): memory of another device",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_adopted_memory_is_looked_after(sim: Simulation, fault: str) -> None:
    """Under every order the fault is told, and nothing where there is none."""

    def rank(_: int) -> None:
        device, room = Device(0), np.zeros(96, np.uint8)
        values = room[16:80]
        sim.adopt(values, 1 if fault == "device" else 0)
        stream = device.stream()
        sim.host_access(values, write=True, what="filling")
        clear(device, values, 64 + 8 * (fault == "bounds"), stream, -16 if fault == "before" else 0)
        if fault == "dropped early":
            sim.drop(values)
        if fault != "no wait":
            device.wait(stream)
        if fault != "dropped early":
            sim.host_access(values, write=False, what="reading")
            device.wait(stream)
            sim.drop(values)
        if fault == "dropped":
            clear(device, values, 64, stream)
            device.wait(stream)
        assert room[:16].sum() == room[80:].sum() == 0
        device.end(stream)

    for lines in under_all_orders(sim, rank):
        assert len(lines) == (fault != "none")
        assert all(line.startswith(FAULTS[fault]) for line in lines)


def test_what_the_host_writes_is_there_for_what_it_enqueues(sim: Simulation) -> None:
    """And for what another thread enqueues that has been told of it, no other."""
    barrier, values = threading.Barrier(2), np.zeros(64, np.uint8)

    def rank(number: int, told: bool) -> None:
        if number == 0:
            sim.host_access(values, write=True, what="filling")
            if told:
                sim.publish()
        barrier.wait()
        if number == 1:
            sim.learn()
            device = Device(0)
            stream = device.stream()
            clear(device, values, 64, stream)
            device.wait(stream)
            device.end(stream)

    race = "race: cuMemsetD8Async (writes) is not ordered after host: filling (writes)"
    for eager in EAGER:
        for told, lines in ((True, []), (False, [race])):
            sim.reset(1, eager, 2)
            sim.adopt(values, 0)
            in_threads(2, functools.partial(rank, told=told))
            assert sim.finish() == lines


def test_memory_is_adopted_once(sim: Simulation) -> None:
    """Until it is dropped; then its place may be anything else's."""
    values = np.zeros(64, np.uint8)
    sim.adopt(values, 0)
    with pytest.raises(ValueError, match="already"):
        sim.adopt(values[32:], 1)
    sim.drop(values)
    with pytest.raises(ValueError, match="dropped twice"):
        sim.drop(values)
    sim.adopt(values[32:], 1)
    sim.drop(values[32:])
    assert sim.finish() == [
        "misuse: sim_adopt of what is device memory already",
        "freed: sim_drop of one block twice",
    ]


@pytest.mark.parametrize("fault", ["none", "race", "bounds"])
def test_a_shipped_kernels_accesses_are_checked(sim: Simulation, fault: str) -> None:
    """By what its argument buffer says that it touches."""

    def rank(number: int) -> None:
        made = Encode(sim, number)
        streams = made.device.stream(), made.device.stream()
        if fault == "race":
            clear(made.device, made.grad.numpy(), 64, streams[0])
        if fault == "bounds":
            made.numel += 2048
        assert made.launch(streams[1], blocks=made.numel // 2048) == 0
        for each in streams:
            made.device.wait(each)
        if fault == "none":
            assert made.right()
        made.drop(sim)
        made.device.end(*streams)

    for lines in under_all_orders(sim, rank):
        if fault == "none":
            assert lines == []
        elif fault == "race":
            assert len(lines) == 1
            assert "int8_encode_fp32_fp32 (reads)" in lines[0]
            assert lines[0].startswith("race: ")
        else:
            assert "bounds: int8_encode_fp32_fp32 (reads): outside of its allocation" in lines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_buckets_table_says_what_is_touched(sim: Simulation, dtype: torch.dtype) -> None:
    """When the kernel runs: the table may still be on its way when it is launched. A tensor that is gone is told."""

    def rank(_: int, kept: int = 2) -> None:
        run = Adopting(sim, 0)
        made = [torch.arange(5000.0), torch.arange(40.0).bfloat16()]
        where, got = launch_bucket.layout(made, [0, 5000]), torch.zeros(5040, dtype=dtype)
        kernel = Launcher(function=bucket.FUNCTION, kernels=bucket.KERNELS, run=run, otherwise=False)
        for tensor in made[:kept]:
            sim.adopt(tensor, 0)
        launch_bucket.pack(where, got, 0.5, kernel=kernel)
        if kept == 2:
            assert torch.equal(got[:5000], (made[0] * 0.5).to(dtype))
            assert torch.equal(got[5000:], (made[1].float() * 0.5).to(dtype))
        run.device.end(run.stream)

    sim.reset(1, 60, 1)
    in_threads(1, rank)
    assert sim.finish() == []
    sim.reset(1, 60, 1)
    in_threads(1, lambda number: rank(number, 1))
    name = f"bucket_pack_{ {torch.float32: 'fp32', torch.bfloat16: 'bf16'}.get(dtype, 'fp16') }"
    assert sim.finish() == [f"stranger: {name} (reads): no device memory"]


def test_a_kernels_function_that_fails_is_told(sim: Simulation) -> None:
    """A table that lies nowhere cannot be read, and a twin's exception does not get lost."""

    def broken(kernel: object) -> object:
        def twin(call: object) -> None:
            raise ArithmeticError("planted")

        return twin

    def rank(number: int) -> None:
        made = Encode(sim, number)
        stream = made.device.stream()
        assert made.launch(stream) == 0
        made.device.wait(stream)
        made.drop(sim)
        made.device.end(stream)

    try:
        for twin, lines in (
            (broken, ["kernel: int8_encode_fp32_fp32: ArithmeticError: planted"]),
            (None, []),
        ):
            simulated.register(Encode.name, **({"twin": twin} if twin else {}))
            sim.reset(1, 0, 1)
            in_threads(1, rank)
            assert sim.finish() == lines
    finally:
        simulated.register(Encode.name)


def test_a_flawed_twin_gives_a_wrong_payload(sim: Simulation) -> None:
    """So comparisons behind the simulated driver depend on what the kernel does."""
    right = []

    def rank(number: int) -> None:
        made = Encode(sim, number)
        stream = made.device.stream()
        assert made.launch(stream) == 0
        made.device.wait(stream)
        right.append(made.right())
        made.drop(sim)
        made.device.end(stream)

    try:
        simulated.register(Encode.name, twin=flawed("loses a residual"))
        in_threads(1, rank)
    finally:
        simulated.register(Encode.name)
    assert sim.finish() == []
    assert right == [False]
