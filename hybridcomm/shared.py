"""Tensors in memory that the node's other ranks map: what `hybridcomm.empty` returns.

A collective on such a tensor, or on any contiguous part of it, reads and writes the peers' tensors where they lie: no
copy, no system call.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from hybridcomm import _C
from hybridcomm.arrays import Array
from hybridcomm.errors import DataTypeError, UnsupportedError

__all__ = ["empty"]


def empty(engine: _C.Engine, size: Sequence[Any], dtype: Any) -> Array:
    """An uninitialised array of shape ``size`` in the engine's shared memory; private memory on a node of one."""
    shape = _shape(size)
    torch = sys.modules.get("torch")
    if torch is not None and (dtype is None or isinstance(dtype, (str, torch.dtype))):
        return _torch_empty(engine, shape, dtype)
    try:
        numpy_dtype = np.dtype("float32" if dtype is None else dtype)
    except TypeError as error:
        raise DataTypeError(f"dtype={dtype!r}: pass a torch or NumPy dtype, or the name of one") from error
    block = engine.allocate(prod(shape) * numpy_dtype.itemsize)
    if block is None:
        return np.empty(shape, numpy_dtype)
    return np.frombuffer(memoryview(block), numpy_dtype, prod(shape)).reshape(shape)


def _torch_empty(engine: _C.Engine, shape: tuple[int, ...], dtype: Any) -> Array:
    import torch

    found = getattr(torch, dtype or "float32", None) if dtype is None or isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise DataTypeError(f"dtype={dtype!r}: torch has no dtype of that name")
    block = engine.allocate(prod(shape) * found.itemsize)
    if block is None:
        return torch.empty(shape, dtype=found)
    # frombuffer refuses a count of 0; the tensor keeps the block alive.
    return torch.frombuffer(block, dtype=found)[: prod(shape)].view(shape)


def _shape(size: Sequence[Any]) -> tuple[int, ...]:
    items = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
    if any(not isinstance(item, (int, np.integer)) or item < 0 for item in items):
        raise UnsupportedError(f"size {tuple(items)}: must be integers >= 0")
    return tuple(map(int, items))
