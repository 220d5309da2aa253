"""What the engine needs to know of a caller's array: address, elements, dtype. torch and numpy; no copy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridcomm.errors import DataTypeError
from hybridcomm.policy import ITEMSIZE

if TYPE_CHECKING:
    import torch

__all__ = ["Array", "View", "view"]

Array = Any
"""A ``torch.Tensor`` on the CPU or a ``numpy.ndarray``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """``numel`` elements of ``dtype`` (a name) at ``address``; ``owner`` keeps the memory alive."""

    address: int
    numel: int
    dtype: str
    owner: Array

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]

    def split(self, sizes: Sequence[int]) -> list[View]:
        """Views of the given sizes, one behind the other."""
        begins = [0, *accumulate(sizes)]
        return [
            View(
                address=self.address + begin * ITEMSIZE[self.dtype],
                numel=size,
                dtype=self.dtype,
                owner=self.owner,
            )
            for begin, size in zip(begins, sizes, strict=False)
        ]


def view(array: Array, what: str = "tensor", *, written: bool = True) -> View:
    """The memory of a contiguous CPU array, to be read and (with ``written``) written in place.

    Raises `DataTypeError` for anything else: another type, a device, a dtype the engine does not know, or a
    layout with gaps (its result could not be written back in place).
    """
    torch = sys.modules.get("torch")  # a torch tensor cannot exist before torch was imported
    if torch is not None and isinstance(array, torch.Tensor):
        return _torch_view(array, what, written)
    if isinstance(array, np.ndarray):
        return _numpy_view(array, what, written)
    raise DataTypeError(f"{what}: expected a torch.Tensor or numpy.ndarray, got {type(array).__name__}")


def _torch_view(tensor: torch.Tensor, what: str, written: bool) -> View:
    if tensor.device.type != "cpu":
        raise DataTypeError(
            f"{what}: is on {tensor.device}; the host engine takes CPU tensors, so move it with .cpu() first"
        )
    if str(tensor.layout) != "torch.strided":
        raise DataTypeError(f"{what}: has layout {tensor.layout}; pass tensor.to_dense()")
    dtype = str(tensor.dtype).removeprefix("torch.")
    _check_dtype(dtype, what)
    if not tensor.is_contiguous():
        raise DataTypeError(f"{what}: is not contiguous; pass tensor.contiguous() and copy the result back")
    if tensor.is_neg() or tensor.is_conj():
        raise DataTypeError(
            f"{what}: is a lazily negated or conjugated view; pass tensor.resolve_neg().resolve_conj()"
        )
    if written and tensor.requires_grad and not tensor.is_leaf:
        raise DataTypeError(f"{what}: is part of an autograd graph; pass tensor.detach()")
    return View(address=tensor.data_ptr(), numel=tensor.numel(), dtype=dtype, owner=tensor)


def _numpy_view(array: np.ndarray[Any, Any], what: str, written: bool) -> View:
    _check_dtype(array.dtype.name, what)
    if not array.dtype.isnative:
        raise DataTypeError(
            f"{what}: has the other byte order; pass array.astype(array.dtype.newbyteorder('='))"
        )
    if not array.flags.c_contiguous or not array.flags.aligned:
        raise DataTypeError(f"{what}: is not C-contiguous; pass numpy.ascontiguousarray(...)")
    if written and not array.flags.writeable:
        raise DataTypeError(f"{what}: is read-only; pass a copy")
    return View(address=array.ctypes.data, numel=array.size, dtype=array.dtype.name, owner=array)


def _check_dtype(dtype: str, what: str) -> None:
    if dtype not in ITEMSIZE:
        raise DataTypeError(
            f"{what}: dtype {dtype} cannot be communicated; convert to one of {', '.join(ITEMSIZE)}"
        )
