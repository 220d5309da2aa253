"""The calls of the CUDA driver that a shipped kernel's launch takes, through ctypes: nothing is linked, nothing waits.

The driver acts on the calling thread's current context. torch makes one with the first tensor on a device.
"""

from __future__ import annotations

import ctypes
from typing import Any

from hybridcomm.kernels.cubins.errors import DriverError
from hybridcomm.kernels.cubins.load import Image

__all__ = ["Driver"]

LIBRARY = "libcuda.so.1"
_BUFFER_POINTER, _BUFFER_SIZE, _END = 1, 2, 0  # CU_LAUNCH_PARAM_*
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_UNASKED = 48 * 1024  # bytes of shared memory that a block gets without asking


class Driver:
    """libcuda, as far as it is needed here.

    ``library``: what has its functions; libcuda.so.1 by default. Functions are loaded once for each context.

    Raises:
        DriverError: there is no libcuda, or a call fails: with the call's name, and the driver's word for the error.
    """

    def __init__(self, library: Any = None) -> None:
        if library is None:
            try:
                library = ctypes.CDLL(LIBRARY)
            except OSError as error:
                raise DriverError(f"{LIBRARY} is not there: install NVIDIA's driver ({error})") from None
        self._library = library
        self._functions: dict[tuple[int, str, int, bool], ctypes.c_void_p] = {}
        self._call("cuInit", 0)

    def _call(self, name: str, *arguments: Any) -> None:
        code = int(getattr(self._library, name)(*arguments))
        if code:
            word = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(word))
            raise DriverError(f"{name}: {(word.value or b'unknown error').decode()} ({code})")

    def _function(self, image: Image) -> ctypes.c_void_p:
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        if not context.value:
            raise DriverError("no CUDA context is current on this thread: put a tensor on the device first")
        key = context.value, image.name, image.arch, image.is_ptx
        if key not in self._functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image.data))
            self._call("cuModuleGetFunction", ctypes.byref(function), module, image.symbol.encode())
            if image.dynamic_shared > _UNASKED:
                self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, image.dynamic_shared)
            self._functions[key] = function
        return self._functions[key]

    def launch(self, image: Image, programs: int, stream: int, **arguments: int | float) -> None:
        """Enqueues so many blocks of a kernel on ``stream`` (a CUstream's address, 0: the legacy one).

        ``arguments`` by name, pointers as addresses, which must stay valid until the stream has come past.

        Raises:
            TypeError: an argument is missing or not the kernel's.
            DriverError: the driver refuses the image or the launch.
        """
        parameters = image.pack(**arguments)
        buffer = ctypes.create_string_buffer(parameters, len(parameters))
        size = ctypes.c_size_t(len(parameters))
        extra = (ctypes.c_void_p * 5)(
            _BUFFER_POINTER, ctypes.addressof(buffer), _BUFFER_SIZE, ctypes.addressof(size), _END
        )
        self._call(
            "cuLaunchKernel", self._function(image), programs, 1, 1, image.threads, 1, 1,
            image.dynamic_shared, ctypes.c_void_p(stream), None, extra,
        )  # fmt: skip
