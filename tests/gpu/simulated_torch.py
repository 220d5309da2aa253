"""torch on the simulated device: memory behind CPU tensors, and what torch would put on a stream, on a simulated one.

A `StreamProvider` for the GPU engine. What it allocates is poisoned device memory between red zones, and goes back when
its tensors do, so that an engine that lets go too early is reported. CPU tensors can be adopted: they count as the
device's then. Host code that reads or writes a tensor itself has to say so (`reads`, `writes`).
"""

from __future__ import annotations

import ctypes
import functools
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hybridcomm.kernels.device_tensors import GRADIENTS
from tests.gpu.calls import host_memory
from tests.gpu.simulated import Simulation, sim_library

__all__ = ["SimulatedTorch"]

_NON_BLOCKING = 1
_THREAD_LOCAL = 1  # how torch captures
_IMAGE = b"elementwise"
_FIELDS = ("target", "source", "count", "types", "factor", "adds")  # eight bytes each
_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint)
_RANGES = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p)
_TORCH = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16}


def _arguments(buffer: int) -> tuple[int, int, int, int, float, int]:
    words = np.frombuffer(ctypes.string_at(buffer, 8 * len(_FIELDS)), "<u8")
    target, source, count, types, factor, adds = words.tolist()
    return target, source, count, types, float(np.uint64(factor).view(np.float64)), adds


def _tensor(address: int, count: int, kind: int) -> torch.Tensor:
    dtype = _TORCH[kind]
    return torch.from_numpy(host_memory(address, count * dtype.itemsize)).view(dtype)


@functools.cache
def _register_elementwise() -> None:
    """One kernel that stands for torch's: target = (adds: target +) source * factor, any two types."""

    def run(buffer: int, _: int) -> None:
        target, source, count, types, factor, adds = _arguments(buffer)
        into, given = _tensor(target, count, types % 4), _tensor(source, count, types // 4)
        result = given.to(torch.float32)
        result = result if factor == 1.0 else result * factor
        into.copy_(into.to(torch.float32) + result if adds else result)

    def touch(buffer: int, _: int, collector: int) -> None:
        target, source, count, types, *_rest = _arguments(buffer)
        rows = [
            (target, count * _TORCH[types % 4].itemsize, 1),
            (source, count * _TORCH[types // 4].itemsize, 0),
        ]
        table = np.array(rows, np.uint64)  # held by its name while the call reads it
        sim_library().sim_touch(collector, table.ctypes.data, len(rows))

    functions = _RUN(run), _RANGES(touch)
    _kept.append(functions)
    table = np.array([(8 * i, 8, 0, 0) for i in range(len(_FIELDS))], np.uint64)
    sim_library().sim_register_image(
        _IMAGE,
        len(_IMAGE),
        b"elementwise",
        b"torch elementwise",
        table.ctypes.data,
        len(table),
        1,
        0,
        *functions,
    )


@functools.cache
def _elementwise(ordinal: int) -> int:
    """Its function on a device, that of the calling thread."""
    _register_elementwise()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), _IMAGE)
    _call("cuModuleGetFunction", ctypes.byref(function), module, b"elementwise")
    return function.value or 0


_kept: list[Any] = []


def _call(name: str, *arguments: Any) -> None:
    code = getattr(sim_library(), name)(*arguments)
    if code:
        raise RuntimeError(f"{name}: {code}")


class SimulatedTorch:
    """One rank's device. Made on the rank's own thread, which then is on that device."""

    def __init__(self, simulation: Simulation, ordinal: int) -> None:
        self.simulation, self.ordinal, self.device = simulation, ordinal, torch.device("cpu")
        self._ranges: dict[int, int] = {}
        self._placed: list[torch.Tensor] = []
        self._sent: list[torch.Tensor] = []
        self._hooks: list[Any] = []
        self._grads: dict[torch.Tensor, torch.Tensor] = {}
        self.over = False  # the simulation has forgotten all memory
        self.lost = False  # a test has broken the device
        context, stream = ctypes.c_void_p(), ctypes.c_void_p()
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal)
        _call("cuCtxSetCurrent", context)
        _call("cuStreamCreateWithPriority", ctypes.byref(stream), _NON_BLOCKING, 0)
        self._stream = stream

    # -- as the engine asks --------------------------------------------------------------------------------

    def owns(self, tensor: Any) -> bool:
        if not isinstance(tensor, torch.Tensor):
            return False
        at = tensor.data_ptr()
        return any(begin <= at < begin + nbytes for begin, nbytes in self._ranges.items())

    def stream(self) -> int:
        return self._stream.value or 0

    def empty(self, nbytes: int) -> torch.Tensor:
        address = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return self._at(address.value, nbytes, lambda: self._free(address.value))

    def _free(self, address: int) -> None:
        if self.lost:
            sim_library().cuMemFree_v2(ctypes.c_uint64(address))  # whose memory went with it
        else:
            _call("cuMemFree_v2", ctypes.c_uint64(address))

    def wrap(self, address: int, nbytes: int, owner: Any) -> torch.Tensor:
        holder = [owner]
        return self._at(address, nbytes, holder.clear)

    def _at(self, address: int, nbytes: int, release: Any) -> torch.Tensor:
        memory = (ctypes.c_uint8 * nbytes).from_address(address)
        self._ranges[address] = nbytes

        def gone() -> None:
            self._ranges.pop(address, None)
            if not self.over:
                release()

        weakref.finalize(memory, gone).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8)

    def upload(self, data: torch.Tensor) -> torch.Tensor:
        target = self.send(data)
        self.synchronize()
        self._sent.pop()
        return target

    def send(self, data: torch.Tensor) -> torch.Tensor:
        nbytes = data.numel() * data.element_size()
        target = self.empty(max(nbytes, 1))[:nbytes].view(data.dtype)
        source = data.contiguous()
        self._sent.append(source)  # read when the stream comes to it
        _call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(target.data_ptr()),
            ctypes.c_void_p(source.data_ptr()),
            ctypes.c_size_t(nbytes),
            self._stream,
        )
        return target.view(data.shape)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty_like(tensor, device="cpu")
        nbytes = tensor.numel() * tensor.element_size()
        _call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(host.data_ptr()),
            ctypes.c_uint64(tensor.data_ptr()),
            ctypes.c_size_t(nbytes),
            self._stream,
        )
        self.synchronize()
        return host

    def copy(
        self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], scale: float = 1.0
    ) -> None:
        for target, source in zip(targets, sources, strict=True):
            self._launch(target, source, scale, adds=False)

    def add(self, target: torch.Tensor, source: torch.Tensor, factor: float) -> None:
        self._launch(target, source, factor, adds=True)

    def zero(self, tensor: torch.Tensor) -> None:
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes:
            _call(
                "cuMemsetD8Async",
                ctypes.c_uint64(tensor.data_ptr()),
                0,
                ctypes.c_size_t(nbytes),
                self._stream,
            )

    def timed(self, call: Callable[[], object]) -> float:
        """Of the host's clock: a simulated device has none."""
        self.synchronize()
        begin = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - begin

    def finite(self, tensor: torch.Tensor, limit: float) -> bool:
        return bool((self.download(tensor).abs() <= limit).all())

    def place(self, module: torch.nn.Module) -> None:
        """Parameters, and their gradients as autograd makes them, count as the device's."""
        for parameter in module.parameters():
            self._placed.append(self.adopt(parameter.data))
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self.made))

    def made(self, parameter: torch.Tensor) -> None:
        """A gradient, if it is not put off. The last step's is given back, as a caching allocator would take it."""
        before, grad = self._grads.get(parameter), parameter.grad
        if grad is None:
            return
        if before is None or before.data_ptr() != grad.data_ptr():
            if before is not None:
                self.drop(before)
            self._grads[parameter] = self.adopt(grad)
        self.writes(grad, "backward")

    # -- for tests -----------------------------------------------------------------------------------------

    @contextmanager
    def other_stream(self) -> Iterator[int]:
        """A second stream, which is the current one meanwhile; at the end the host waits for it."""
        first, second = self._stream, ctypes.c_void_p()
        _call("cuStreamCreateWithPriority", ctypes.byref(second), _NON_BLOCKING, 0)
        self._stream = second
        try:
            yield second.value or 0
            self.synchronize()
        finally:
            self._stream = first
            _call("cuStreamDestroy_v2", second)

    @contextmanager
    def capture(self) -> Iterator[list[ctypes.c_void_p]]:
        """What is put on the current stream goes into a graph; behind it, the list has it, to be launched."""
        graph, made, executable = ctypes.c_void_p(), [], ctypes.c_void_p()
        _call("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)
        yield made
        _call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        _call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        _call("cuGraphDestroy", graph)
        made.append(executable)

    def replay(self, executable: ctypes.c_void_p) -> None:
        _call("cuGraphLaunch", executable, self._stream)

    def forget(self, executable: ctypes.c_void_p) -> None:
        _call("cuGraphExecDestroy", executable)

    def synchronize(self) -> None:
        _call("cuStreamSynchronize", self._stream)

    def delay(self, microseconds: int) -> None:
        """Nothing: streams are late as it is, in seeded order."""

    def adopt(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor counts as the device's from now on, until it is dropped."""
        self.simulation.adopt(tensor, self.ordinal)
        self._ranges[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    def drop(self, tensor: torch.Tensor) -> None:
        self._ranges.pop(tensor.data_ptr(), None)
        self.simulation.drop(tensor)

    def reads(self, tensor: torch.Tensor, what: str = "reads") -> None:
        """The host is about to read a tensor itself; reported if that is too early."""
        self.simulation.host_access(tensor, write=False, what=what)

    def writes(self, tensor: torch.Tensor, what: str = "writes") -> None:
        self.simulation.host_access(tensor, write=True, what=what)

    def close(self) -> None:
        if self.lost:
            return  # nothing can be given back
        self.synchronize()
        for hook in self._hooks:
            hook.remove()
        for tensor in (*self._placed, *self._grads.values()):
            self.drop(tensor)
        self._grads.clear()
        _call("cuStreamDestroy_v2", self._stream)

    def _launch(self, target: torch.Tensor, source: torch.Tensor, factor: float, *, adds: bool) -> None:
        if not target.numel():
            return
        types = GRADIENTS.index(target.dtype) + 4 * GRADIENTS.index(source.dtype)
        values = [target.data_ptr(), source.data_ptr(), target.numel(), types]
        words = np.array([*values, int(np.float64(factor).view(np.uint64)), int(adds)], np.uint64)
        buffer, size = words.tobytes(), ctypes.c_size_t(words.nbytes)
        given = ctypes.create_string_buffer(buffer, len(buffer))
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(given), 2, ctypes.addressof(size), 0)
        function, one_block = ctypes.c_void_p(_elementwise(self.ordinal)), (1, 1, 1, 1, 1, 1)
        _call("cuLaunchKernel", function, *one_block, 0, self._stream, None, extra)
