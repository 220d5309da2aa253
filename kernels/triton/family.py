"""The functions of a codec together, as its host code launches them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridcomm.kernels.triton import withdraw
from hybridcomm.kernels.triton.function import Function

__all__ = ["Family", "family"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Kernels of codecs that differ in constants only, and the pass behind their encoders. ``constants``: of a spec.

    Each is a `Function`, or a launcher in its place.
    """

    encode: Any
    reencode: Any
    decode: Any
    constants: Callable[[Any], dict[str, int]]
    withdraw: Any = withdraw.FUNCTION


def family(
    module: str, constants: Callable[[Any], dict[str, int]], arguments: Mapping[str, Sequence[str]]
) -> Family:
    """What ``jit/module.py`` has. ``arguments``: of ``encode``, ``reencode`` and ``decode``."""
    made = {
        kind: Function(module=module, name=f"{kind}_kernel", arguments=tuple(names))
        for kind, names in arguments.items()
    }
    return Family(constants=constants, **made)
