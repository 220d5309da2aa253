"""Gradients and residuals that kernels are checked with: what is common, and what takes the paths that it does not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["KINDS", "NONFINITE", "values"]

Floats = npt.NDArray[np.float32]

KINDS = (
    "normal",
    "heavy",
    "tied",
    "zero",
    "negative zero",
    "denormal",
    "spike",
    "huge",
    "same magnitude",
    "half steps",
    "drifting scale",
    "nan",
    "inf",
    "overflowing sum",
)
NONFINITE = ("nan", "inf", "overflowing sum")


def values(kind: str, numel: int, seed: int) -> tuple[Floats, Floats]:  # noqa: PLR0912
    """A gradient and a residual of one kind, (numel,) fp32 each."""
    rng = np.random.default_rng([seed, numel])
    grad = rng.standard_normal(numel).astype(np.float32)
    e_in = (rng.standard_normal(numel) * 0.3).astype(np.float32)
    where = int(rng.integers(numel)) if numel else 0
    with np.errstate(all="ignore"):
        if kind == "heavy":
            grad = (rng.standard_cauchy(numel) * 10.0 ** rng.integers(-30, 30, numel)).astype(np.float32)
        elif kind == "tied":
            grad, e_in = rng.integers(-3, 4, numel).astype(np.float32), np.zeros(numel, np.float32)
        elif kind == "zero":
            grad, e_in = np.zeros(numel, np.float32), np.zeros(numel, np.float32)
        elif kind == "negative zero":
            grad, e_in = np.full(numel, -0.0, np.float32), np.full(numel, -0.0, np.float32)
        elif kind == "denormal":
            grad, e_in = (grad * 1e-39).astype(np.float32), (e_in * 1e-42).astype(np.float32)
        elif kind == "spike":
            grad, e_in = np.zeros(numel, np.float32), e_in * np.float32(1e-30)
            grad[where : where + 1] = 1e30
        elif kind == "huge":
            grad, e_in = np.sign(grad) * np.float32(3e38), e_in * np.float32(1e20)
        elif kind == "same magnitude":
            grad, e_in = np.sign(grad) * np.float32(1.5), np.zeros(numel, np.float32)
        elif kind == "half steps":  # between two codes of many scales: what rounding does with a tie
            grad = (rng.integers(-127, 128, numel) * 0.5).astype(np.float32)
            e_in = np.zeros(numel, np.float32)
        elif kind == "drifting scale":
            grad = grad * np.exp2(np.linspace(-60, 60, numel)).astype(np.float32)
        elif kind == "nan":
            grad[where : where + 1] = np.nan
        elif kind == "inf":
            e_in[where : where + 1] = -np.inf
        elif kind == "overflowing sum":
            grad[where : where + 1] = e_in[where : where + 1] = 3e38
    return np.where(np.isposinf(grad) & (kind == "heavy"), np.float32(3e38), grad).astype(np.float32), e_in
