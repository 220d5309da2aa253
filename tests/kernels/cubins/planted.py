"""Kernels that the gate must refuse, each for one reason, beside one that it must not; importing this needs triton."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from hybridcomm.kernels.device import Argument, Budget, DeviceKernel

__all__ = ["PLANTED", "SOUND"]

_ARRAYS = (Argument(name="x", type="*fp32"), Argument(name="y", type="*fp32"))
_TAIL = Argument(name="n", type="i64")


@triton.jit
def sound(x, y, n, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(y + at, tl.load(x + at, mask=inside) + 1.0, mask=inside)


@triton.jit
def spills(x, y, n, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, mask=inside, other=0.0)
    tl.store(y + at, value - tl.sum(value, 0), mask=inside)


@triton.jit
def fuses(x, y, n, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, mask=inside)
    tl.store(y + at, tl.fma(value, value, 1.0), mask=inside)


@triton.jit
def adds_floats_atomically(x, y, n, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0.0)
    tl.atomic_add(y, tl.sum(value, 0))


@triton.jit
def divides(x, y, n, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(y + at, 1.0 / tl.load(x + at, mask=inside), mask=inside)


SOUND = DeviceKernel(
    name="sound",
    source="nowhere.py",
    function="sound",
    arguments=(*_ARRAYS, _TAIL),
    constants=(("BLOCK", 1024),),
    num_warps=4,
    elements=1024,
    budget=Budget(nbytes=1.02 * 8, instructions=8, registers=64),
)


def _planted(function: Any, **changes: Any) -> tuple[Any, DeviceKernel]:
    return function, replace(SOUND, name=function.__name__, function=function.__name__, **changes)


_LARGE = 1 << 14  # 512 elements per thread of one warp: more than it has registers

PLANTED: dict[str, tuple[Any, DeviceKernel]] = {
    "wide": _planted(
        sound,
        arguments=(*_ARRAYS, replace(_TAIL, aligned=False)),
        budget=replace(SOUND.budget, instructions=16),
    ),
    "spill": _planted(
        spills,
        constants=(("BLOCK", _LARGE),),
        elements=_LARGE,
        num_warps=1,
        budget=Budget(nbytes=1.02 * 8, instructions=64, registers=255),
    ),
    "contraction": _planted(fuses),
    "float atomic": _planted(
        adds_floats_atomically, budget=Budget(nbytes=1.02 * 8, instructions=16, registers=64)
    ),
    "approximate": _planted(divides, budget=Budget(nbytes=1.02 * 8, instructions=32, registers=64)),
    "registers": _planted(sound, budget=replace(SOUND.budget, registers=8)),
    "instructions": _planted(sound, budget=replace(SOUND.budget, instructions=1)),
}
"""The rule that it breaks -> the function and the kernel."""
