"""Shipped kernels by name, as bytes for ``cuModuleLoadData`` with all that a launch needs; numpy alone."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybridcomm.kernels.cubins.errors import AlignmentError, ArchitectureError, ArtefactError, KernelError
from hybridcomm.kernels.cubins.manifest import ARTEFACTS, Blob, Build, Entry, Manifest, Parameter, unpack

__all__ = ["Image", "find", "find_ptx", "names"]

_TYPES = {"i1": "u1", "fp16": "f2", "bf16": "u2", "fp32": "f4", "fp64": "f8"}


@dataclass(frozen=True, kw_only=True)
class Image:
    """A loadable image and its launch: grid ``(grid(numel), 1, 1)``, block ``(threads, 1, 1)``.

    ``arch``: of the cubin, or that the PTX is for and above; ``dynamic_shared``: bytes to pass at the launch;
    ``static_shared``: bytes that the image itself asks for; ``aligned``: parameters that have to be multiples of 16.
    """

    name: str
    data: bytes
    arch: int
    is_ptx: bool
    symbol: str
    threads: int
    elements: int
    static_shared: int
    dynamic_shared: int
    registers: int
    parameters: tuple[Parameter, ...]
    aligned: tuple[str, ...]

    def grid(self, numel: int) -> int:
        """Blocks for ``numel`` elements."""
        return -(-numel // self.elements)

    @functools.cached_property
    def _layout(self) -> np.dtype[Any]:
        return _layout_of(self.parameters)

    def pack(self, **arguments: Any) -> bytes:
        """The parameter buffer (``CU_LAUNCH_PARAM_BUFFER_POINTER``): pointers as integers; hidden ones are null.

        Raises:
            TypeError: an argument is missing or not the kernel's.
            AlignmentError: an argument is no multiple of 16, as the kernel was compiled for.
        """
        wanted = [parameter.name for parameter in self.parameters if not parameter.hidden]
        if sorted(wanted) != sorted(arguments):
            raise TypeError(
                f"{self.name}: takes {', '.join(wanted)}; got {', '.join(arguments) or 'nothing'}"
            )
        for name in self.aligned:
            if arguments[name] % 16:
                raise AlignmentError(
                    f"{self.name}: {name}={arguments[name]:#x} is no multiple of 16, which the kernel was compiled for"
                )
        buffer = np.zeros((), self._layout)
        for name, value in arguments.items():
            buffer[name] = value
        return buffer.tobytes()


@functools.cache  # few lists of parameters differ, and images may be made anew for each launch
def _layout_of(parameters: tuple[Parameter, ...]) -> np.dtype[Any]:
    last = parameters[-1]
    return np.dtype(
        {
            "names": [p.name for p in parameters],
            "formats": [_format(p) for p in parameters],
            "offsets": [p.offset for p in parameters],
            "itemsize": last.offset + last.nbytes,
        }
    )


def _format(parameter: Parameter) -> str:
    if parameter.type.startswith("*"):
        return "<u8"
    return "<" + _TYPES.get(parameter.type, f"{parameter.type[0]}{parameter.nbytes}")


@functools.lru_cache(maxsize=4)
def _entries(folder: Path) -> dict[str, Entry]:
    return {entry.kernel.name: entry for entry in Manifest.read(folder).entries}


def names(folder: Path = ARTEFACTS) -> tuple[str, ...]:
    """The shipped kernels, sorted."""
    return tuple(_entries(folder))


def _entry(name: str, folder: Path) -> Entry:
    try:
        return _entries(folder)[name]
    except KeyError:
        raise KernelError(
            f"{name!r}: no such kernel was built; known: {', '.join(names(folder)) or 'none'}"
        ) from None


def _read(entry: Entry, blob: Blob, folder: Path) -> bytes:
    data = unpack(folder, entry.kernel.name)[blob.offset : blob.offset + blob.nbytes]
    if hashlib.sha256(data).hexdigest() != blob.sha256:
        raise ArtefactError(
            f"{entry.kernel.name}: the artefact is damaged; reinstall, or in a checkout run `make cubins`"
        )
    return data


def find(name: str, arch: int, folder: Path = ARTEFACTS) -> Image:
    """The cubin of kernel ``name`` for compute capability ``arch`` (80: 8.0).

    A cubin runs on its own and on later minor capabilities of the same major one: that of sm_80 on 8.6 and 8.9.

    Raises:
        KernelError: no such kernel.
        ArchitectureError: none of its cubins runs there.
        ArtefactError: the artefact is missing or damaged.
    """
    entry = _entry(name, folder)
    fitting = [build for build in entry.builds if build.arch // 10 == arch // 10 and build.arch <= arch]
    if not fitting:
        built = ", ".join(f"sm_{build.arch}" for build in entry.builds)
        raise ArchitectureError(
            f"{name}: not built for sm_{arch}, only for {built}; Triton's JIT serves other architectures,"
            f" and from sm_{entry.builds[0].arch} on the PTX of find_ptx does"
        )
    build = max(fitting, key=lambda one: one.arch)
    return _image(entry, build, folder, is_ptx=False)


def find_ptx(name: str, arch: int | None = None, folder: Path = ARTEFACTS) -> Image:
    """The PTX of kernel ``name``, null-terminated, for the driver to compile.

    Without ``arch`` it is that of the oldest architecture: every CUDA 12 driver takes it, for all later ones too. With
    it, it is what the cubin for exactly ``arch`` was assembled from. ``registers`` are the cubin's, in both cases.

    Raises:
        KernelError: no such kernel.
        ArchitectureError: not built for ``arch``.
        ArtefactError: the artefact is missing or damaged.
    """
    entry = _entry(name, folder)
    for build in entry.builds:
        if arch in (None, build.arch):
            return _image(entry, build, folder, is_ptx=True)
    raise ArchitectureError(f"{name}: no PTX for sm_{arch}; without arch there is one for all from sm_80 on")


def _image(entry: Entry, build: Build, folder: Path, *, is_ptx: bool) -> Image:
    data = _read(entry, build.ptx if is_ptx else build.cubin, folder)
    return Image(
        name=entry.kernel.name,
        data=data + b"\0" if is_ptx else data,
        arch=build.arch,
        is_ptx=is_ptx,
        symbol=entry.symbol,
        threads=entry.threads,
        elements=entry.kernel.elements,
        static_shared=build.static_shared,
        dynamic_shared=build.dynamic_shared,
        registers=build.registers,
        parameters=entry.parameters,
        aligned=tuple(argument.name for argument in entry.kernel.arguments if argument.aligned),
    )
