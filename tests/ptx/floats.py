"""Floating-point arithmetic: round to nearest even, subnormals kept, NaN results canonical.

Only the spellings whose result is fixed: no ``.ftz``, no ``.approx``, and no ``add``, ``sub`` or ``mul`` without a
rounding, which an assembler may contract to a fused multiply-add. bf16 is computed in fp32, fp16 by numpy likewise:
24 bits are at least twice the format's and two more, so rounding twice is rounding once.
Source: PTX ISA, sections "Floating Point Instructions" and "Half Precision Floating Point Instructions".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.ptx.integers import COMPARISONS, set_predicates
from tests.ptx.operation import Operation
from tests.ptx.types import Array, Bools

__all__ = ["NAN_BITS", "canonical", "operations", "round_bf16", "to_odd_sum", "widen"]

NAN_BITS = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}
_NUMPY_NAN = {
    np.dtype(f"f{n // 8}"): np.array(NAN_BITS[f"f{n}"], f"u{n // 8}").view(f"f{n // 8}")[()]
    for n in (16, 32, 64)
}


def canonical(values: Array) -> Array:
    """``values`` with NVIDIA's one NaN in place of any; changed in place."""
    nan = np.isnan(values)
    if nan.any():
        values = np.where(nan, _NUMPY_NAN[values.dtype], values)
    return values


def widen(a: Array) -> Array:
    """bf16 bits as fp32."""
    return (np.asarray(a, np.uint32) << np.uint32(16)).view(np.float32)


def round_bf16(values: Array) -> Array:
    """fp32 or fp64 (already rounded to odd) to bf16 bits, half to even."""
    values = np.ascontiguousarray(values)
    if values.dtype == np.float64:
        return _bf16_of_double(values)
    raw = values.view(np.uint32)
    carry = np.uint32(0x7FFF) + (raw >> np.uint32(16) & np.uint32(1))
    return np.where(np.isnan(values), NAN_BITS["bf16"], (raw + carry) >> np.uint32(16)).astype(np.uint16)


def _bf16_of_double(values: Array) -> Array:
    """By way of an fp32 rounded to odd, which loses nothing that the second rounding must see."""
    single = values.astype(np.float32)
    raw = single.view(np.uint32)
    back = single.astype(np.float64)
    toward = np.where(np.abs(back) > np.abs(values), raw - np.uint32(1), raw)
    odd = np.where((back != values) & np.isfinite(values), toward | np.uint32(1), raw)
    return round_bf16(odd.astype(np.uint32).view(np.float32))


def to_odd_sum(p: Array, z: Array) -> Array:
    """p + z in fp64, rounded to odd: rounding it again to a format of up to 50 bits is rounding once."""
    total = p + z
    back = total - p
    error = (p - (total - back)) + (z - back)
    raw = np.asarray(total).view(np.int64)
    odd = (error != 0) & (raw & 1 == 0) & np.isfinite(total)
    away = (error > 0) == (total > 0)
    return np.where(odd, np.where(away, raw + 1, raw - 1), raw).view(np.float64)


def _fused(a: Array, b: Array, c: Array) -> Array:
    x, y, z = (np.asarray(v, np.float64) for v in (a, b, c))
    return to_odd_sum(x * y, z)


def _raw(a: Array) -> Array:
    return np.asarray(a).view(f"u{a.dtype.itemsize}")


def _extreme(pick: Any, join: Any, spread: bool) -> Callable[..., Array]:
    """min and max: -0 below +0; a NaN loses to a number, or with ``.NaN`` wins."""

    def choose(a: Array, b: Array) -> Array:
        a, b = np.broadcast_arrays(a, b)
        result = np.where(a == b, join(_raw(a), _raw(b)).view(a.dtype), pick(a, b))
        if spread:
            result = np.where(np.isnan(a) | np.isnan(b), _NUMPY_NAN[a.dtype], result)
        return canonical(result)

    return choose


def _sign(change: Callable[[Array, Any], Array]) -> Callable[[Array], Array]:
    """abs and neg; what a NaN becomes is open (PTX ISA), so it becomes the canonical one."""

    def apply(a: Array) -> Array:
        a = np.asarray(a)
        top = a.dtype.itemsize * 8 - 1
        raw = _raw(a)
        return canonical(change(raw, raw.dtype.type(1 << top)).view(a.dtype))

    return apply


def _rounded(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *sources: canonical(function(*sources))


def _in_fp32(function: Callable[..., Array]) -> Callable[..., Array]:
    """A bf16 operation from the same in fp32."""
    return lambda *sources: round_bf16(function(*(widen(x) for x in sources)))


_EXTREMES = {
    "min": _extreme(np.fmin, np.bitwise_or, False),
    "max": _extreme(np.fmax, np.bitwise_and, False),
    "min.NaN": _extreme(np.fmin, np.bitwise_or, True),
    "max.NaN": _extreme(np.fmax, np.bitwise_and, True),
}
_SIGNS = {"abs": _sign(lambda raw, top: raw & ~top), "neg": _sign(lambda raw, top: raw ^ top)}
_RINGS: dict[str, Any] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _functions(t: str) -> Iterator[tuple[str, int, Callable[..., Array]]]:
    """Instructions of numpy's types: spelling before the type, number of sources, function."""
    for name, ufunc in _RINGS.items():
        yield f"{name}.rn", 2, _rounded(ufunc)
    if t != "f64":
        kind = {"f16": np.float16, "f32": np.float32}[t.removesuffix("x2")]
        yield "fma.rn", 3, lambda a, b, c: canonical(_fused(a, b, c).astype(kind))
    for name, function in _EXTREMES.items():
        if t != "f32x2":
            yield name, 2, function
    for name, sign in _SIGNS.items():
        if t != "f32x2":
            yield name, 1, sign
    if t in ("f32", "f64"):
        yield "div.rn", 2, _rounded(np.divide)
        yield "sqrt.rn", 1, _rounded(np.sqrt)
        yield "rcp.rn", 1, _rounded(lambda a: a.dtype.type(1) / a)


def _bf16_functions() -> Iterator[tuple[str, int, Callable[..., Array]]]:
    for name, ufunc in _RINGS.items():
        yield f"{name}.rn", 2, _in_fp32(ufunc)
    yield "fma.rn", 3, lambda *sources: round_bf16(_fused(*(widen(x) for x in sources)))
    for name, function in (_EXTREMES | _SIGNS).items():
        yield name, 1 if name in _SIGNS else 2, _in_fp32(function)


def _copysign(a: Array, b: Array) -> Array:
    """The magnitude of b with the sign of a."""
    a, b = np.broadcast_arrays(a, b)
    top = _raw(a).dtype.type(1 << (8 * a.dtype.itemsize - 1))
    return ((_raw(b) & ~top) | (_raw(a) & top)).view(a.dtype)


_TESTS: dict[str, Callable[[Array], Bools]] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "notanumber": np.isnan,
    "number": lambda a: ~np.isnan(a),
    "normal": lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny),
    "subnormal": lambda a: (a != 0) & (np.abs(a) < np.finfo(a.dtype).tiny),
}


def _unordered(a: Array, b: Array) -> Bools:
    return np.asarray(np.isnan(a) | np.isnan(b))


def _comparisons() -> Iterator[tuple[str, str, Any]]:
    for t in ("f16", "f32", "f64", "bf16"):
        read = widen if t == "bf16" else np.asarray
        for name, ufunc in COMPARISONS.items():
            yield name, t, lambda a, b, f=ufunc, r=read: f(r(a), r(b)) & ~_unordered(r(a), r(b))
            yield f"{name}u", t, lambda a, b, f=ufunc, r=read: f(r(a), r(b)) | _unordered(r(a), r(b))
        yield "num", t, lambda a, b, r=read: ~_unordered(r(a), r(b))
        yield "nan", t, lambda a, b, r=read: _unordered(r(a), r(b))


def operations() -> Iterator[tuple[str, Operation]]:
    """Spelling and meaning of every instruction here."""
    for t in ("f32", "f64", "f16", "f16x2", "f32x2"):
        for name, count, function in _functions(t):
            yield f"{name}.{t}", Operation(result=t, sources=(t,) * count, function=function)
    for t in ("bf16", "bf16x2"):
        for name, count, function in _bf16_functions():
            yield f"{name}.{t}", Operation(result=t, sources=(t,) * count, function=function)
    for t in ("f32", "f64"):
        yield f"copysign.{t}", Operation(result=t, sources=(t, t), function=_copysign)
        for name, test in _TESTS.items():
            yield f"testp.{name}.{t}", Operation(result="pred", sources=(t,), function=test)
    yield from set_predicates(_comparisons())
