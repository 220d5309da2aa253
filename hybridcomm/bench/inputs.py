"""Crafted inputs: whole numbers whose reduction is exact in every dtype, different per rank and per call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcomm.arrays import Array
from hybridcomm.errors import DataTypeError, UnsupportedError

__all__ = ["DTYPES", "OPS", "PERIOD", "array_of", "exact", "gradient", "pattern"]

PERIOD = 251  # prime: data that ends up at another place differs, whatever power of two it moved by

DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8")
_LARGEST = {"float16": 2048, "bfloat16": 256, "uint8": 255}
"""Up to here all whole numbers are exact; the other dtypes reach 2^24 at least."""

_Numbers = npt.NDArray[np.int64]


def _sum(parts: Sequence[_Numbers]) -> _Numbers:
    return np.asarray(np.add.reduce(parts), np.int64)


def _mean(parts: Sequence[_Numbers]) -> _Numbers:
    return _sum(parts) // len(parts)


OPS: dict[str, Callable[[Sequence[_Numbers]], _Numbers]] = {"sum": _sum, "mean": _mean}
"""Reductions by the name that the library gives them."""


def pattern(rank: int, *, world_size: int, dtype: str, op: str) -> _Numbers:
    """``PERIOD`` whole numbers for a rank; reduced over all ranks they are whole and exact in ``dtype``.

    Raises `UnsupportedError` where a dtype is too narrow for so many ranks.
    """
    unit = world_size if op == "mean" else 1  # multiples of W: the mean is whole
    limit = min(_LARGEST.get(dtype, 1 << 24) // (world_size * unit), 100)
    if limit < 1:
        raise UnsupportedError(f"--dtype {dtype} cannot hold an exact {op} over {world_size} ranks")
    rng = np.random.default_rng([7919, rank])
    numbers: _Numbers = rng.integers(0, limit + 1, PERIOD) * unit
    return numbers


def exact(op: str, *, world_size: int, dtype: str) -> _Numbers:
    """What ``op`` over the patterns of all ranks gives."""
    parts = [pattern(rank, world_size=world_size, dtype=dtype, op=op) for rank in range(world_size)]
    return OPS[op](parts)


def array_of(numbers: npt.NDArray[Any], numel: int, dtype: str) -> Array:
    """``numbers`` over and over, ``numel`` in all; bfloat16 is a torch tensor, the rest are numpy arrays."""
    if dtype != "bfloat16":
        return np.resize(numbers, numel).astype(dtype)
    try:
        import torch
    except ImportError as error:
        raise DataTypeError("--dtype bfloat16 needs torch: pip install 'hybridcomm[torch]'") from error
    return torch.from_numpy(np.resize(numbers, numel).astype(np.float32)).to(torch.bfloat16)


def gradient(rank: int, numel: int) -> npt.NDArray[np.float32]:
    """As uneven as gradients are: the cube of a normal variable, seeded per rank."""
    values: npt.NDArray[np.float32] = np.random.default_rng([104729, rank]).standard_normal(numel, np.float32)
    return values * values * values
