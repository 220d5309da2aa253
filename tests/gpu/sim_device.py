"""Ranks on simulated devices, as tests write them: threads of Python that call the driver through ctypes."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from hybridcomm.kernels.cubins.driver import Driver
from hybridcomm.kernels.cubins.errors import DriverError
from tests.gpu.simulated import sim_library

__all__ = ["Device", "in_threads"]


class Device:
    """The calling thread's: a context, streams, and what a test wants of CUDA."""

    def __init__(self, ordinal: int) -> None:
        self.cuda, self.ordinal = sim_library(), ordinal
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal)
        self.call("cuCtxSetCurrent", context)
        self.driver = Driver(self.cuda)

    def call(self, name: str, *given: Any) -> None:
        code = getattr(self.cuda, name)(*given)
        if code:
            raise DriverError(f"{name}: {code}")

    def stream(self) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.call("cuStreamCreateWithPriority", ctypes.byref(made), 1, 0)
        return made

    def event(self) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.call("cuEventCreate", ctypes.byref(made), 2)
        return made

    def wait(self, stream: ctypes.c_void_p) -> None:
        self.call("cuStreamSynchronize", stream)

    def end(self, *streams: ctypes.c_void_p) -> None:
        for stream in streams:
            self.call("cuStreamDestroy_v2", stream)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Raises what one of them has raised."""
    errors: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(count)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if errors:
        raise errors[0]
