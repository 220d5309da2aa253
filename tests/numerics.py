"""Tolerances, computed from dtype, number of terms and codec; no test types one by hand."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half the spacing of 1.0: one correctly rounded operation errs by at most this, relatively."""

SMALLEST_NORMAL = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}


def gamma(rounds: int, dtype: str) -> float:
    """Higham's gamma_n = n u / (1 - n u): the relative error bound of n chained roundings."""
    share = rounds * UNIT_ROUNDOFF[dtype]
    if share >= 1:
        raise ValueError(f"{rounds} roundings in {dtype} have no meaningful bound")
    return share / (1 - share)


def sum_tolerance(terms: ArrayLike, dtype: str, *, extra: int = 0) -> NDArray[np.float64]:
    """|computed - exact| of a sum over axis 0, in any order, with ``extra`` further roundings of the result.

    n terms take n - 1 roundings in the worst order: gamma(n - 1 + extra) * sum |terms|, plus underflow.
    """
    magnitudes = np.abs(np.asarray(terms, np.float64))
    rounds = len(magnitudes) - 1 + extra
    bound = gamma(rounds, dtype) * magnitudes.sum(axis=0)
    return np.asarray(bound + rounds * SMALLEST_NORMAL[dtype] * UNIT_ROUNDOFF[dtype])


def topk_error_bound(values: ArrayLike, *, block: int, k: int, value_bits: int) -> float:
    """Upper bound of |x - C(x)|^2 of one block-wise top-k pass: what is dropped plus what quantising loses.

    The k largest of b values hold at least k/b of the energy, and each kept one errs by at most half a step
    (one step where it clamps) of a scale below 2^(2 - bits) of the block's largest magnitude.
    """
    flat = np.asarray(values, np.float64)
    padded = np.zeros(-(-flat.size // block) * block)
    padded[: flat.size] = flat
    blocks = np.abs(padded.reshape(-1, block))
    kept = np.sort(blocks, axis=1)[:, ::-1][:, :k]
    dropped = (blocks**2).sum() - (kept**2).sum()
    step = blocks.max(axis=1) * 2.0 ** (2 - value_bits)
    return float(dropped + (k * step**2).sum())
