"""The simulated driver and NCCL in this process: controls for tests whose ranks are threads of Python.

    with Simulation(seed=3, eager_percent=60, threads=2) as sim:
        sim.register_shipped_kernels()
        ...         # ranks are threads; the engine finds the library by HYBRIDCOMM_CUDA and HYBRIDCOMM_NCCL
        assert sim.finish() == []

One library per process: handles, modules and registered kernels outlive a round. Locks: the simulation runs kernels'
functions, which are Python's, under its own lock, so whoever has the interpreter's lock must not wait for it.
ctypes.CDLL gives that lock up around every call; extensions have to do so themselves. Garbage is not collected by
itself while a simulation is there: finalizers that call the driver would do so inside of a kernel, with the lock held.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from hybridcomm.kernels.cubins.load import Image, find, names
from hybridcomm.kernels.cubins.manifest import Manifest
from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.kernels.device_access import ranges
from tests.gpu.calls import Call, arguments, host_memory
from tests.gpu.simulation import library
from tests.gpu.twins import Twin, twin_of

__all__ = ["ARCH", "Fault", "Simulation", "sim_library"]

ARCH = 90
"""Compute capability of the simulated devices."""

_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint)
_RANGES = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p)
_U64, _BYTES, _POINTER = ctypes.c_uint64, ctypes.c_char_p, ctypes.c_void_p


class Fault(enum.IntEnum):
    """What befalls an operation; the first three are what ncclCommGetAsyncError says then."""

    SYSTEM_ERROR = 2
    INTERNAL_ERROR = 3
    REMOTE_ERROR = 6
    HANGS = 100
    BREAKS = 101


@functools.cache
def sim_library() -> ctypes.CDLL:
    """libsim.so, with the controls' types; also exports what CUDA and NCCL do."""
    found = ctypes.CDLL(str(library()))
    types: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "sim_reset": (None, (ctypes.c_uint, ctypes.c_int, ctypes.c_int)),
        "sim_finish": (ctypes.c_int, ()),
        "sim_report": (ctypes.c_char_p, (ctypes.c_int,)),
        "sim_stand_by": (None, ()),
        "sim_publish": (None, ()),
        "sim_learn": (None, ()),
        "sim_share_hosts": (None, ()),
        "sim_patience": (None, (ctypes.c_int,)),
        "sim_inject": (None, (ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_int)),
        "sim_refuse": (None, (ctypes.c_int, ctypes.c_char_p, ctypes.c_long, ctypes.c_int)),
        "sim_nccl_version": (None, (ctypes.c_int,)),
        "sim_symmetric": (None, (ctypes.c_int,)),
        "sim_roots": (ctypes.c_int, ()),
        "sim_by_copy_engines": (ctypes.c_int, (ctypes.c_int,)),
        "sim_register_image": (
            None,
            (
                *(_BYTES, ctypes.c_size_t, _BYTES, _BYTES, _POINTER, ctypes.c_int),
                *(ctypes.c_uint, ctypes.c_size_t, _RUN, _RANGES),
            ),
        ),
        "sim_touch": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)),
        "sim_readable": (ctypes.c_int, (_U64, ctypes.c_size_t)),
        "sim_failed": (None, (ctypes.c_void_p, ctypes.c_char_p)),
        "sim_adopt": (ctypes.c_int, (_U64, ctypes.c_size_t, ctypes.c_int)),
        "sim_drop": (ctypes.c_int, (_U64,)),
        "sim_host_access": (ctypes.c_int, (_U64, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p)),
    }
    for name, (result, given) in types.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, given
    return found


@contextmanager
def _careful(collector: int | None, name: str) -> Iterator[None]:
    """Inside of a kernel's function: what fails is reported, for no exception gets through C."""
    try:
        yield
    except Exception as error:
        sim_library().sim_failed(collector, f"{name}: {type(error).__name__}: {error}".encode())


def _read(address: int, nbytes: int) -> bytes:
    if not sim_library().sim_readable(address, nbytes):
        raise ValueError(f"{nbytes} bytes at {address:#x} that a kernel reads are no device memory")
    return host_memory(address, nbytes).tobytes()


def _functions(kernel: DeviceKernel, image: Image, twin: Callable[[DeviceKernel], Twin]) -> tuple[Any, Any]:
    """What the simulation calls when it runs a kernel."""
    last = image.parameters[-1]
    nbytes, run_twin = last.offset + last.nbytes, twin(kernel)

    def run(buffer: int, programs: int) -> None:
        with _careful(None, kernel.name):
            values = arguments(image.parameters, ctypes.string_at(buffer, nbytes))
            run_twin(Call(kernel=kernel, programs=programs, values=values, view=host_memory))

    def touch(buffer: int, programs: int, collector: int) -> None:
        with _careful(collector, kernel.name):
            values = arguments(image.parameters, ctypes.string_at(buffer, nbytes))
            found = ranges(kernel, values, programs=programs, read=_read)
            rows = np.array([(each.begin, each.nbytes, each.write) for each in found], np.uint64)
            sim_library().sim_touch(collector, rows.ctypes.data, len(found))

    return _RUN(run), _RANGES(touch)


@functools.cache
def _kernels() -> dict[str, DeviceKernel]:
    return {entry.kernel.name: entry.kernel for entry in Manifest.read().entries}


_registered: dict[tuple[str, int], Any] = {}
"""Callbacks, which have to outlive the library."""


def register(name: str, arch: int = ARCH, twin: Callable[[DeviceKernel], Twin] = twin_of) -> None:
    """A shipped kernel's image for ``arch``, run by its twin."""
    kernel, image = _kernels()[name], find(name, arch)
    promised = {each.name for each in kernel.arguments if each.aligned}
    table = [(p.offset, p.nbytes, p.hidden, p.name in promised) for p in image.parameters]
    rows = np.array(table, np.uint64)
    functions = _functions(kernel, image, twin)
    sim_library().sim_register_image(
        image.data, len(image.data), image.symbol.encode(), name.encode(), rows.ctypes.data, len(table),
        image.threads, image.dynamic_shared, *functions,
    )  # fmt: skip
    _registered[name, arch] = functions, _registered.get((name, arch))


@dataclass(kw_only=True)
class Simulation:
    """A round. ``seed`` and ``eager_percent`` say how operations are ordered; ``threads``: ranks that will come.

    The thread that makes it need not be waited for: where it is the only rank, ``threads`` is 0.
    """

    seed: int = 1
    eager_percent: int = 0
    threads: int = 1
    _collecting: bool = field(default=True, init=False)

    def __enter__(self) -> Simulation:
        self._collecting = gc.isenabled()
        gc.disable()
        gc.collect()  # what a test before has left, handles of its round among it
        self.reset(self.seed, self.eager_percent, self.threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Garbage goes before the next round, which forgets this one."""
        gc.collect()
        if self._collecting:
            gc.enable()

    def reset(self, seed: int, eager_percent: int = 0, threads: int = 1) -> None:
        """A new round: nothing that was allocated or made is there any more."""
        self.seed, self.eager_percent, self.threads = seed, eager_percent, threads
        sim_library().sim_reset(seed, eager_percent, threads)
        sim_library().sim_stand_by()

    def finish(self) -> list[str]:
        """What was reported, leaks included; garbage is none."""
        gc.collect()
        lines = sim_library().sim_finish()
        return [sim_library().sim_report(i).decode() for i in range(lines)]

    def register_shipped_kernels(self, arch: int = ARCH) -> None:
        """All of them, once in a process."""
        for name in names():
            if (name, arch) not in _registered:
                register(name, arch)

    def adopt(self, tensor: Any, device: int) -> None:
        """A contiguous CPU tensor's or array's memory is the device's from now on; hold the tensor."""
        address, nbytes = _memory(tensor)
        if not sim_library().sim_adopt(address, nbytes, device):
            raise ValueError(f"{nbytes} bytes at {address:#x} are device memory already")

    def drop(self, tensor: Any) -> None:
        """The reverse; whatever is not waited for, or touches it later, is reported."""
        if not sim_library().sim_drop(_memory(tensor)[0]):
            raise ValueError("dropped twice, or never adopted")

    def host_access(self, tensor: Any, *, write: bool, what: str) -> bool:
        """This thread itself reads or writes adopted memory now; whether that is in order (else it is reported)."""
        address, nbytes = _memory(tensor)
        return bool(sim_library().sim_host_access(address, nbytes, write, what.encode()))

    def inject(self, fault: Fault, *, device: int, operation: int, communicator: int = -1) -> None:
        """Lets ``fault`` befall operation number ``operation`` (a call, or a group's calls) of the device's
        communicator number ``communicator``, both counted from 0 in the order in which they are made. The operation
        never ends then, before ncclCommAbort. Without a communicator: BREAKS, behind so many operations that the
        device has run.
        """
        sim_library().sim_inject(device, communicator, operation, int(fault))

    def refuse(self, call: str, code: int, *, device: int, count: int = 0) -> None:
        """Lets the device's call number ``count`` of a function of the driver, counted from now on, answer ``code``;
        of those that ask what is planted: `sim::planted` in sim/*.cpp.
        """
        sim_library().sim_refuse(device, call.encode(), count, code)

    def share_hosts(self) -> None:
        """From here on, threads of one device count as ordered among themselves: for engines with own threads."""
        sim_library().sim_share_hosts()

    def patience(self, milliseconds: int) -> None:
        """How long nothing may move while somebody waits or asks: then that is reported, and what waits fails."""
        sim_library().sim_patience(milliseconds)

    def nccl_version(self, version: int) -> None:
        """What ncclGetVersion says (22703: 2.27.3); newer calls are refused. Stays for later rounds."""
        sim_library().sim_nccl_version(version)

    def symmetric(self, yes: bool) -> None:
        """Whether communicators have windows; else registering one succeeds, and gives none. Stays for later rounds."""
        sim_library().sim_symmetric(yes)

    def by_copy_engines(self, device: int) -> int:
        """How many of the device's communicators leave collectives to copy engines where they can."""
        return int(sim_library().sim_by_copy_engines(device))

    def roots(self) -> int:
        """How many ids the last ncclCommInitRankScalable was given."""
        return int(sim_library().sim_roots())

    def publish(self) -> None:
        """What this thread knows, those know that `learn` it, and threads that come later."""
        sim_library().sim_publish()

    def learn(self) -> None:
        """Behind a barrier, say, that publishers have passed."""
        sim_library().sim_learn()

    def stand_by(self) -> None:
        """Of a thread that waits by other means, or does nothing that others wait for: it is in no standstill."""
        sim_library().sim_stand_by()


def _memory(tensor: Any) -> tuple[int, int]:
    if isinstance(tensor, np.ndarray):
        return tensor.ctypes.data, tensor.nbytes
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()
