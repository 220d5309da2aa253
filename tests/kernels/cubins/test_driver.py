# ruff: noqa: N802 (the driver's own names)
"""Launching through the CUDA driver, with a libcuda that executes PTX instead: parameter buffers, grids, errors."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from hybridcomm.kernels import parse, reference
from hybridcomm.kernels.cubins import DriverError, find, launcher
from hybridcomm.kernels.cubins.driver import Driver
from hybridcomm.kernels.cubins.launcher import on_cuda
from hybridcomm.kernels.cubins.registry import gather
from hybridcomm.kernels.device_codec import device_codec
from hybridcomm.kernels.vectors import values
from tests.kernels.cases import DIGEST
from tests.kernels.ptx_run import PtxRun

KERNELS = {kernel.name: kernel for kernels in gather().values() for kernel in kernels}
NUMEL, STREAM = 3 * 4096 + 16, 0x7700


class FakeCuda:
    """What `Driver` calls of libcuda. Images are told apart by their bytes; ``tensors``: all that kernels may touch.

    ``failing``: the name of a call that fails, with error 700.
    """

    def __init__(self, *, context: int = 1, failing: str = "") -> None:
        self.context, self.failing = context, failing
        self.loaded: list[str] = []
        self.streams: set[int] = set()
        self.tensors: list[torch.Tensor] = []
        self.run = PtxRun(arch=80)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 700 if name == self.failing else getattr(self, f"_{name}")(*arguments) or 0

    def _cuInit(self, flags: int) -> None:
        assert flags == 0

    def _cuGetErrorName(self, code: int, word: Any) -> None:
        word._obj.value = b"CUDA_ERROR_ILLEGAL_ADDRESS" if code == 700 else None

    def _cuCtxGetCurrent(self, context: Any) -> None:
        context._obj.value = self.context

    def _cuModuleLoadData(self, module: Any, data: ctypes.c_char_p) -> None:
        address = ctypes.cast(data, ctypes.c_void_p).value
        assert address is not None
        images = {name: find(name, 80).data for name in KERNELS}
        (name,) = [n for n, image in images.items() if ctypes.string_at(address, len(image)) == image]
        self.loaded.append(name)
        module._obj.value = len(self.loaded)

    def _cuModuleGetFunction(self, function: Any, module: ctypes.c_void_p, symbol: bytes) -> None:
        assert module.value is not None
        assert find(self.loaded[module.value - 1], 80).symbol.encode() == symbol
        function._obj.value = module.value

    def _cuLaunchKernel(self, function: ctypes.c_void_p, *rest: Any) -> None:
        *sizes, shared, stream, none, extra = rest
        assert function.value is not None
        kernel = KERNELS[self.loaded[function.value - 1]]
        image = find(kernel.name, 80)
        assert sizes[1:] == [1, 1, image.threads, 1, 1]
        assert (shared, none) == (image.dynamic_shared, None)
        assert (extra[0], extra[2], extra[4]) == (1, 2, None)
        nbytes = ctypes.cast(extra[3], ctypes.POINTER(ctypes.c_size_t)).contents.value
        buffer = ctypes.string_at(extra[1], nbytes)
        self.streams.add(stream.value)
        self.run(kernel, sizes[0], self._arguments(image, buffer))

    def _arguments(self, image: Any, buffer: bytes) -> dict[str, Any]:
        """The parameter buffer read as a device would, addresses as the tensors that are there."""
        found: dict[str, Any] = {}
        kinds = {"fp32": "f4", "i32": "i4", "i64": "i8"}
        for parameter in image.parameters:
            raw = buffer[parameter.offset : parameter.offset + parameter.nbytes]
            if parameter.hidden:
                assert not any(raw)
            elif parameter.type.startswith("*"):
                address = int.from_bytes(raw, "little")
                found[parameter.name] = self._at(address) if address else None
            else:
                found[parameter.name] = np.frombuffer(raw, kinds[parameter.type])[0].item()
        return found

    def _at(self, address: int) -> torch.Tensor:
        return next(tensor for tensor in self.tensors if tensor.data_ptr() == address)


@pytest.mark.parametrize("text", ["int8", "sign1", "gtop1:0.01", "randk:0.01", "topk:0.01+sign", "topk:0.01"])
def test_encoding_and_decoding_through_the_driver_equal_the_oracle(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, cuda, read = parse(text), FakeCuda(), list[str]()
    monkeypatch.setattr(launcher, "find", lambda name, arch: read.append(name) or find(name, arch))
    codec = device_codec(spec, on_cuda(Driver(cuda), 80, lambda: STREAM), jit=False)
    grad, e_in = (torch.from_numpy(each) for each in values("heavy", NUMEL, 3))
    e_out, payload = torch.empty(NUMEL), torch.empty(spec.nbytes(NUMEL), dtype=torch.uint8)
    cuda.tensors += [grad, e_in, e_out, payload]
    codec.encode(grad, e_in, e_out, payload, DIGEST)
    want, rest = np.zeros(spec.nbytes(NUMEL), np.uint8), np.zeros(NUMEL, np.float32)
    reference.encode(spec, grad.numpy(), e_in.numpy(), rest, want, DIGEST)
    assert payload.numpy().tobytes() == want.tobytes()
    assert e_out.numpy().tobytes() == rest.tobytes()

    payloads, out = torch.from_numpy(np.stack([want, want])), torch.zeros(NUMEL)
    total = np.zeros(NUMEL, np.float32)
    cuda.tensors += [payloads, out]
    codec.decode_add(payloads, out, 0.5, DIGEST)
    reference.decode_add(spec, list(payloads.numpy()), total, 0.5, DIGEST)
    assert out.numpy().tobytes() == total.tobytes()

    loads = len(cuda.loaded)
    codec.encode(grad, e_in, e_out, payload, DIGEST)
    assert len(cuda.loaded) == loads == len(set(cuda.loaded))  # a module is loaded once
    assert read == cuda.loaded  # and an artefact is read once, however often its kernel is launched
    assert cuda.streams == {STREAM}


def test_errors_name_the_call_and_the_drivers_word() -> None:
    with pytest.raises(DriverError, match=r"^cuInit: CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"):
        Driver(FakeCuda(failing="cuInit"))
    image, memory = find("withdraw_fp32", 80), torch.zeros(64)
    arguments = {
        "e_in": 0,
        "e_out": 0,
        "payload": memory.data_ptr(),
        "nwords": 0,
        "numel": 0,
        "checksum": 0,
    }
    with pytest.raises(DriverError, match="no CUDA context"):
        Driver(FakeCuda(context=0)).launch(image, 1, 0, **arguments)
    with pytest.raises(DriverError, match="cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS"):
        Driver(FakeCuda(failing="cuLaunchKernel")).launch(image, 1, 0, **arguments)
    with pytest.raises(TypeError, match="takes"):
        Driver(FakeCuda()).launch(image, 1, 0, payload=1)


def test_without_a_driver_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridcomm.kernels.cubins.driver.LIBRARY", "libnothing.so.1")
    with pytest.raises(DriverError, match=r"libnothing\.so\.1 is not there: install"):
        Driver()
