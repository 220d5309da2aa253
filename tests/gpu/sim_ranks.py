"""What ranks on simulated devices run in tests: launches on tensors that the device borrows."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

from hybridcomm.kernels import parse, reference
from hybridcomm.kernels.cubins import find
from hybridcomm.kernels.cubins.launcher import on_cuda
from tests.gpu.sim_device import Device
from tests.gpu.simulated import ARCH, Simulation
from tests.kernels import cases

__all__ = ["Adopting", "Encode", "extra_of"]

DIGEST = cases.DIGEST


class Adopting:
    """Launches through the simulated driver; tensors are its device's memory while a kernel has them."""

    def __init__(self, sim: Simulation, ordinal: int) -> None:
        self.sim, self.device = sim, Device(ordinal)
        self.stream = self.device.stream()
        self.launch = on_cuda(self.device.driver, ARCH, lambda: self.stream.value or 0)

    def __call__(self, kernel: Any, programs: int, given: Any) -> None:
        storages: dict[int, tuple[Any, int]] = {}
        for value in given.values():
            if isinstance(value, torch.Tensor):
                whole = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())  # type: ignore[call-overload]
                storages[whole.data_ptr()] = whole, 0
        for whole, _ in storages.values():
            self.sim.adopt(whole, self.device.ordinal)
        self.launch(kernel, programs, given)
        self.device.wait(self.stream)
        for whole, _ in storages.values():
            self.sim.drop(whole)


def extra_of(data: bytes, nbytes: int) -> tuple[Any, Any, Any]:
    buffer, size = ctypes.create_string_buffer(data, len(data)), ctypes.c_size_t(nbytes)
    extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 0)
    return extra, buffer, size


class Encode:
    """An int8 encoder's launch, whole programs alone, and how it may be spoilt."""

    name, numel = "int8_encode_fp32_fp32", 4096

    def __init__(self, sim: Simulation, ordinal: int) -> None:
        self.device, self.image, spec = Device(ordinal), find(self.name, ARCH), parse("int8")
        self.function = self.device.driver._function(self.image)
        self.grad, self.e_in = (torch.from_numpy(x) for x in cases.values("normal", self.numel, ordinal))
        self.e_out, self.payload = (
            torch.empty(self.numel),
            torch.zeros(spec.nbytes(self.numel), dtype=torch.uint8),
        )
        head = reference.header(spec, self.numel, digest=DIGEST, flags=0)
        head[48:56].view(np.uint64)[0] = reference.checksum(head)
        self.payload[:64] = torch.from_numpy(head)
        self.codes = spec.codes_offset(self.numel) // 16
        for tensor in self.tensors:
            sim.adopt(tensor, ordinal)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.grad, self.e_in, self.e_out, self.payload

    def drop(self, sim: Simulation) -> None:
        for tensor in self.tensors:
            sim.drop(tensor)

    def launch(
        self, stream: Any, *, flaw: str = "", threads: int = 0, shared: int = 0, blocks: int = 2
    ) -> int:
        values = {
            "grad": self.grad.data_ptr(), "e_in": self.e_in.data_ptr(),
            "e_out": self.e_out.data_ptr(), "payload": self.payload.data_ptr(), "numel": self.numel,
            "first": 0, "codes": self.codes, "decay": 1.0,
        }  # fmt: skip
        data = bytearray(self.image.pack(**values))
        if flaw == "misaligned":  # in the buffer itself: packing it would be refused
            data[self.image.parameters[0].offset] += 4
        if flaw == "hidden":
            data[self.image.parameters[-1].offset] = 1
        extra = extra_of(bytes(data), len(data) - 4 * (flaw == "short"))
        threads = threads or self.image.threads
        shared += self.image.dynamic_shared
        launch = self.device.cuda.cuLaunchKernel
        return int(launch(self.function, blocks, 1, 1, threads, 1, 1, shared, stream, None, extra[0]))

    def right(self) -> bool:
        spec, want, rest = (
            parse("int8"),
            np.zeros(self.payload.numel(), np.uint8),
            np.zeros(self.numel, np.float32),
        )
        reference.encode(spec, self.grad.numpy(), self.e_in.numpy(), rest, want, DIGEST)
        same = self.payload.numpy().tobytes() == want.tobytes()
        return same and self.e_out.numpy().tobytes() == rest.tobytes()
