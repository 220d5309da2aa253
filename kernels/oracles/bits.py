"""fp32 as bits: what the oracles share."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["INF_KEY", "QUIET_NAN", "Bytes", "Floats", "Ints", "Oracle", "keys", "power"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

INF_KEY = 0x7F800000
QUIET_NAN = np.uint32(0x7FC00000).view(np.float32)


def keys(values: Floats) -> npt.NDArray[np.int32]:
    """Magnitudes as integers: they order like |values|, NaN above infinity."""
    return values.view(np.int32) & np.int32(0x7FFFFFFF)


def power(exponent: Ints) -> Floats:
    """2^(exponent - 127) for biased exponents in [1, 254]."""
    return (exponent.astype(np.int32) << 23).view(np.float32)


class Oracle(Protocol):
    """One family's part of ``reference``: the body behind the header. A module does."""

    def encode(self, spec: Any, acc: Floats, payload: Bytes, seed: int) -> Floats:
        """Fills the sections of ``payload``, which are zero; returns what was not sent. ``acc`` is finite."""

    def check(self, spec: Any, payload: Bytes, numel: int) -> bool:
        """Whether an encoder could have written these sections; header and length are right."""

    def add(self, spec: Any, payload: Bytes, out: Floats, weight: np.float32) -> None:
        """Adds ``weight`` times the decoded values; the payload has been checked."""
