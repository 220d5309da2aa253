"""A launch as a kernel's twin sees it: arguments decoded from their buffer, arrays as views of memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcomm.kernels.cubins.manifest import Parameter
from hybridcomm.kernels.device import DeviceKernel

__all__ = ["Call", "View", "arguments", "host_memory"]

Array = npt.NDArray[Any]
View = Callable[[int, int], npt.NDArray[np.uint8]]
"""``view(address, nbytes)``: these bytes, to be read and written in place."""

_TYPES = {"u8": "u1", "bf16": "<u2", "fp16": "<f2", "fp32": "<f4", "i32": "<u4", "i64": "<u8"}


def arguments(parameters: Sequence[Parameter], buffer: bytes) -> dict[str, int | float]:
    """By name, as the parameter table says; hidden ones are left out."""
    found: dict[str, int | float] = {}
    for parameter in parameters:
        if not parameter.hidden:
            kind = "<u8" if parameter.type.startswith("*") else "<" + _scalar(parameter)
            found[parameter.name] = np.frombuffer(buffer, kind, 1, parameter.offset)[0].item()
    return found


def _scalar(parameter: Parameter) -> str:
    return f"{'f' if parameter.type.startswith('fp') else 'i'}{parameter.nbytes}"


def host_memory(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """Memory of this process. Whoever asks has made sure that it is there."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


@dataclass(frozen=True, kw_only=True)
class Call:
    """``programs`` of a kernel with these arguments, on memory that ``view`` shows."""

    kernel: DeviceKernel
    programs: int
    values: Mapping[str, int | float]
    view: View

    def number(self, name: str) -> int:
        return int(self.values[name])

    def real(self, name: str) -> np.float32:
        return np.float32(self.values[name])

    def has(self, name: str) -> bool:
        return name in self.values

    def constant(self, name: str) -> int:
        return dict(self.kernel.constants).get(name, 0)

    def kind(self, name: str) -> str:
        """Of what type an array's elements are: ``fp32``, ``bf16``, ..."""
        return next(each.type[1:] for each in self.kernel.arguments if each.name == name)

    def bytes(self, name: str, first: int, nbytes: int) -> npt.NDArray[np.uint8]:
        return self.view(self.number(name) + first, nbytes)

    def array(self, name: str, first: int, count: int) -> Array:
        """Elements of an array; bf16 as its bits, integers without a sign."""
        dtype = np.dtype(_TYPES[self.kind(name)])
        return self.bytes(name, first * dtype.itemsize, count * dtype.itemsize).view(dtype)

    def reach(self) -> int:
        """Elements of the region that the programs have, where they begin with the first."""
        return min(self.number("numel"), self.programs * self.kernel.elements)
