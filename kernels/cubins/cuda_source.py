"""From CUDA C++ to PTX by NVRTC of CUDA 12, without a GPU and without nvcc."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

from hybridcomm.kernels.cubins import ptx, tools
from hybridcomm.kernels.cubins.errors import BuildError
from hybridcomm.kernels.cubins.registry import ROOT
from hybridcomm.kernels.device import DeviceKernel

__all__ = ["WHEEL", "compile_ptx", "find", "version"]

WHEEL = "nvidia-cuda-nvrtc-cu12"
_OK = 0
_STDINT = b"""#pragma once
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
"""  # NVRTC has no C library


def find() -> Path | None:
    """The library, if the wheel is installed."""
    try:
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        return None
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    found = [path for folder in folders for path in Path(folder).glob("lib/libnvrtc.so.12")]
    return found[0] if found else None


def _library() -> ctypes.CDLL:
    path = find()
    if path is None:
        raise BuildError(f"CUDA C++ needs NVRTC of CUDA 12: pip install {WHEEL}")
    return ctypes.CDLL(str(path))


def version() -> str:
    """Of NVRTC, such as ``12.9``.

    Raises:
        BuildError: it is not installed.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.value.decode()


@functools.lru_cache(maxsize=8)  # the kernels of one file follow each other
def _compile(path: Path, content: bytes, arch: int) -> str:
    library = _library()
    wanted = [
        f"--gpu-architecture=compute_{arch}",
        "--fmad=false",
        "--std=c++17",
        f"--include-path={path.parent}",
    ]
    wanted += [f"--include-path={folder}" for folder in tools.headers()]
    options = (ctypes.c_char_p * len(wanted))(*(option.encode() for option in wanted))
    program, name, header = ctypes.c_void_p(), ctypes.c_char_p(b"stdint.h"), ctypes.c_char_p(_STDINT)
    library.nvrtcCreateProgram(
        ctypes.byref(program), content, path.name.encode(), 1, ctypes.byref(header), ctypes.byref(name)
    )
    try:
        if library.nvrtcCompileProgram(program, len(wanted), options) != _OK:
            raise BuildError(f"{path.name}: {_text(library, program, 'ProgramLog').strip()}")
        return ptx.lower(ptx.stripped(_text(library, program, "PTX")), arch)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def compile_ptx(kernel: DeviceKernel, arch: int, root: Path = ROOT) -> str:
    """The PTX of the one kernel ``kernel.function`` (``extern "C"``) of the file that ``kernel`` names.

    Raises:
        BuildError: what NVRTC says, that it is not installed, or that the file has no such kernel.
    """
    path = root / kernel.source
    return ptx.only(_compile(path, path.read_bytes(), arch), kernel.function)
