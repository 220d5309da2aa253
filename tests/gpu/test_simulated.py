"""Shipped kernels on the simulated driver, launched from threads of Python; memory of tensors as device memory."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from hybridcomm.kernels import parse
from hybridcomm.kernels.cubins import find
from tests.gpu.codec_cases import SPECS, decoded, encoded, sizes
from tests.gpu.sim_device import Device, in_threads
from tests.gpu.sim_ranks import Adopting, Encode
from tests.gpu.simulated import ARCH, Simulation

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


@pytest.mark.parametrize("text", SPECS)
def test_every_codec_runs_on_simulated_devices(sim: Simulation, text: str) -> None:
    """Two ranks at once, each on a device of its own: images are told apart though symbols are the same."""
    spec = parse(text)

    def rank(number: int) -> None:
        run = Adopting(sim, number)
        for kind in ("normal", "nan"):
            got, want = encoded(run, spec, kind, sizes(spec)[1], ("fp32", "fp32"))
            assert got == want
        sums = decoded(run, spec, ("normal", "heavy"), sizes(spec)[1], 0.5)
        assert next(sums) == next(sums)
        run.device.end(run.stream)

    sim.reset(1, 60, 2)
    in_threads(2, rank)
    assert sim.finish() == []


@pytest.mark.parametrize("eager", EAGER)
def test_threads_of_python_launch_a_shipped_kernel(sim: Simulation, eager: int) -> None:
    def rank(number: int) -> None:
        made = Encode(sim, number)
        stream = made.device.stream()
        assert made.launch(stream) == 0
        made.device.wait(stream)
        assert made.right()
        made.drop(sim)
        made.device.end(stream)

    for seed in range(10):
        sim.reset(seed, eager, 4)
        in_threads(4, rank)
        assert sim.finish() == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "buffer": ({"flaw": "short"}, "an argument buffer of 68 bytes, not 72"),
    "hidden": ({"flaw": "hidden"}, "the parameter at byte 64 is hidden, and not null"),
    "misaligned": ({"flaw": "misaligned"}, "the parameter at byte 0 is no multiple of 16"),
    "threads": ({"threads": 64}, "64 threads per block, not 32"),
    "shared": ({"shared": 16}, "bytes of dynamic shared memory, not"),
    "no blocks": ({"blocks": 0}, "blocks in x alone, at least one, are wanted"),
}


@pytest.mark.parametrize("flaw", REFUSED)
def test_a_launch_that_the_kernel_was_not_built_for_is_refused(sim: Simulation, flaw: str) -> None:
    options, message = REFUSED[flaw]
    codes = []

    def rank(number: int) -> None:
        made = Encode(sim, number)
        stream = made.device.stream()
        codes.append(made.launch(stream, **options))
        made.device.wait(stream)
        made.drop(sim)
        made.device.end(stream)

    in_threads(1, rank)
    (line,) = sim.finish()
    assert line.startswith("misuse: int8_encode_fp32_fp32: ")
    assert message in line
    assert codes == [1]


def test_images_and_functions_that_are_none_are_refused(sim: Simulation) -> None:
    def rank(number: int) -> None:
        device, image, module, function = (
            Device(number),
            find("int8_decode", ARCH),
            ctypes.c_void_p(),
            ctypes.c_void_p(),
        )
        changed = image.data[:200] + bytes([image.data[200] ^ 1]) + image.data[201:]
        load, get = device.cuda.cuModuleLoadData, device.cuda.cuModuleGetFunction
        assert load(ctypes.byref(module), ctypes.c_char_p(changed)) == 200
        assert load(ctypes.byref(module), ctypes.c_char_p(image.data)) == 0
        assert get(ctypes.byref(function), module, b"encode_kernel") == 500
        assert get(ctypes.byref(function), module, image.symbol.encode()) == 0
        device.call("cuModuleUnload", module)
        launch = device.cuda.cuLaunchKernel
        assert launch(function, 1, 1, 1, image.threads, 1, 1, image.dynamic_shared, None, None, None) == 400

    in_threads(1, rank)
    assert sim.finish() == ["stranger: a function that is none, or whose module was unloaded"]
