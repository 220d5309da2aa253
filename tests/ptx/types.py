"""PTX's fundamental types as numpy sees them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Bools", "bits", "dtype", "packed", "storage", "view"]

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]

_PACKED: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "f16x2": ("f16", 2),
        "bf16x2": ("b16", 2),
        "f32x2": ("f32", 2),
        "e4m3x2": ("b8", 2),
        "e5m2x2": ("b8", 2),
        "s16x2": ("s16", 2),
        "u16x2": ("u16", 2),
        "b128": ("b64", 2),
        "bf16": ("b16", 1),
    }
)
_SIMPLE = re.compile(r"(?:[bus](?:8|16|32|64)|f(?:16|32|64))")


def packed(name: str) -> tuple[str, int]:
    """The type of one part, and how many parts; bf16 has no numpy type and stays bits."""
    if name in _PACKED:
        return _PACKED[name]
    if not _SIMPLE.fullmatch(name):
        raise ValueError(f"unknown type .{name}")
    return name, 1


def dtype(name: str) -> np.dtype[Any]:
    """numpy's type of one part."""
    if name == "pred":
        return np.dtype(np.bool_)
    kind = packed(name)[0]
    return np.dtype({"b": "u", "u": "u", "s": "i", "f": "f"}[kind[0]] + str(int(kind[1:]) // 8))


def bits(name: str) -> int:
    """Width of a value; a predicate has one bit."""
    if name == "pred":
        return 1
    kind, parts = packed(name)
    return int(kind[1:]) * parts


def storage(name: str, lanes: int) -> Array:
    """A register's value for each lane: (lanes,), unsigned; predicates bool; b128 (lanes, 2)."""
    if name == "pred":
        return np.zeros(lanes, np.bool_)
    width = bits(name)
    return np.zeros((lanes, 2) if width == 128 else lanes, f"u{min(width, 64) // 8}")


def view(register: Array, name: str) -> Array:
    """The same bytes as ``name``: (lanes,), or (lanes, parts) where it has parts."""
    if name == "pred":
        return register
    lanes, (_, parts) = len(register), packed(name)
    return register.view(dtype(name)).reshape((lanes, parts) if parts > 1 else (lanes,))
