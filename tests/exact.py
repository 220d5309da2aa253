"""Inputs whose sums are exact in any order: small integers, different per rank, element and call.

With these every reduction order gives the same bits, so tests demand equality and never a tolerance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MANTISSA_BITS = {"float32": 24, "bfloat16": 8, "float16": 11, "float64": 53, "int64": 63, "int32": 31}


def exact_ints(
    *, rank: int, numel: int, world: int, call: int = 0, dtype: str = "float32"
) -> NDArray[np.int64]:
    """Signed integers, ``numel`` of them, such that |any partial sum over ``world`` ranks| fits the mantissa.

    Value depends on (rank, element, call): a swapped rank, element or call changes the sum.
    """
    limit = min((1 << MANTISSA_BITS[dtype]) // max(world, 1), 1 << 16)
    if limit < 4:
        raise ValueError(f"{world} ranks leave no distinct exact integers in {dtype}")
    half = limit // 2
    index = np.arange(numel, dtype=np.uint64)
    mixed = index * np.uint64(0x9E3779B97F4A7C15) + np.uint64((rank + 1) * 0xD1B54A32D192ED03 % 2**64)
    mixed ^= mixed >> np.uint64(29)
    mixed = mixed * np.uint64(0xBF58476D1CE4E5B9) + np.uint64((call * 7919 + 13) * 0x94D049BB133111EB % 2**64)
    mixed ^= mixed >> np.uint64(32)
    return (mixed % np.uint64(2 * half - 1)).astype(np.int64) - (half - 1)


def exact_sum(*, numel: int, world: int, call: int = 0, dtype: str = "float32") -> NDArray[np.int64]:
    """The sum over all ranks of `exact_ints`."""
    total = np.zeros(numel, np.int64)
    for rank in range(world):
        total += exact_ints(rank=rank, numel=numel, world=world, call=call, dtype=dtype)
    return total
