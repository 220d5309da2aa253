"""What an instruction without memory or neighbours computes: types in, types out, a function of arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.ptx.types import Array, Bools

__all__ = ["Operation"]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """``function(*sources) -> result``, each an array of all lanes in numpy's type of the PTX type, or a scalar.

    ``wide``: registers may be wider than the types (PTX allows that for conversions). ``undefined``: the lanes
    whose result PTX leaves open, which is an error when they are active. ``second``: the same for the second
    destination of ``p|q``.
    """

    result: str
    sources: tuple[str, ...]
    function: Callable[..., Array]
    wide: bool = False
    undefined: Callable[..., Bools] | None = None
    second: Callable[..., Any] | None = None
