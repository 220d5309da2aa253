"""The simulated NCCL as tests call it, through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.gpu.simulated import sim_library

__all__ = [
    "IN_PROGRESS",
    "REMOTE_ERROR",
    "SUCCESS",
    "SYSTEM_ERROR",
    "UNHANDLED_CUDA_ERROR",
    "Communicator",
    "Config",
    "UniqueId",
    "unique_id",
]

SUCCESS, UNHANDLED_CUDA_ERROR, SYSTEM_ERROR, INTERNAL_ERROR = 0, 1, 2, 3
INVALID_USAGE, REMOTE_ERROR, IN_PROGRESS = 5, 6, 7
FLOAT32, SUM = 7, 0
_UNDEFINED = -(1 << 31)


class UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * 128),)


class Config(ctypes.Structure):
    """ncclConfig_t as it was in 2.18."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        *((name, ctypes.c_int) for name in ("cgaClusterSize", "minCTAs", "maxCTAs")),
        ("netName", ctypes.c_char_p),
        ("splitShare", ctypes.c_int),
        *((f"later{i}", ctypes.c_int) for i in range(12)),
    )

    @classmethod
    def of(cls, blocking: bool) -> Config:
        unset = [_UNDEFINED] * 12
        return cls(
            ctypes.sizeof(cls), 0xCAFEBEEF, 21801, int(blocking), *[_UNDEFINED] * 3, None, _UNDEFINED, *unset
        )


def unique_id() -> UniqueId:
    made = UniqueId()
    assert sim_library().ncclGetUniqueId(ctypes.byref(made)) == SUCCESS
    return made


class Communicator:
    """One rank's; calls answer with NCCL's code."""

    def __init__(self, handle: ctypes.c_void_p) -> None:
        self.handle = handle

    @classmethod
    def join(cls, identity: UniqueId, size: int, rank: int, *, blocking: bool = True) -> Communicator:
        """Of a communicator that does not block: in progress until `settle` has come back."""
        handle, config = ctypes.c_void_p(), Config.of(blocking)
        initialise = sim_library().ncclCommInitRankConfig
        code = initialise(ctypes.byref(handle), size, identity, rank, ctypes.byref(config))
        assert code == SUCCESS or (code == IN_PROGRESS and not blocking)
        return cls(handle)

    def state(self) -> int:
        code = ctypes.c_int()
        assert sim_library().ncclCommGetAsyncError(self.handle, ctypes.byref(code)) == SUCCESS
        return code.value

    def settle(self) -> int:
        """Asks until nothing is in progress."""
        while (code := self.state()) == IN_PROGRESS:
            pass
        return code

    def split(self, color: int, key: int) -> Communicator:
        child = ctypes.c_void_p()
        code = sim_library().ncclCommSplit(self.handle, color, key, ctypes.byref(child), None)
        assert code in (SUCCESS, IN_PROGRESS)
        self.settle()
        made = Communicator(child)
        made.settle()
        return made

    def call(self, name: str, *given: Any) -> int:
        return int(getattr(sim_library(), name)(self.handle, *given))

    def all_reduce(self, values: npt.NDArray[np.float32], stream: Any) -> int:
        address, count = ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(values.size)
        all_reduce = sim_library().ncclAllReduce
        return int(all_reduce(address, address, count, FLOAT32, SUM, self.handle, stream))

    def abort(self) -> int:
        return self.call("ncclCommAbort")

    def destroy(self) -> int:
        return self.call("ncclCommDestroy")


def until(done: Callable[[], bool], tries: int = 2000) -> bool:
    """Whether it has come true while somebody asked again and again."""
    return any(done() for _ in range(tries))
