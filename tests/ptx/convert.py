"""cvt: widths, roundings, saturation, small float formats. Source: PTX ISA, "Data Movement and Conversion: cvt"."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from tests.ptx.floats import canonical, round_bf16, widen
from tests.ptx.operation import Operation
from tests.ptx.types import Array, bits, dtype

__all__ = ["FP8", "SmallFloat", "operations"]

_INTEGERS = tuple(f"{kind}{width}" for width in (8, 16, 32, 64) for kind in "us")
_ROUND: Mapping[str, Any] = MappingProxyType(
    {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
)


@dataclass(frozen=True, kw_only=True)
class SmallFloat:
    """An 8-bit format: sign, exponent, ``mantissa`` bits; ``lowest`` exponent of normal values; ``top``: its code."""

    mantissa: int
    lowest: int
    top: int

    def encode(self, values: Array) -> Array:
        """fp32 to codes, half to even; what is larger than the largest takes it, NaN is 0x7F."""
        exact = np.abs(np.asarray(values, np.float64))
        _, exponent = np.frexp(exact)
        quantum = np.where(exact == 0, self.lowest, np.maximum(exponent - 1, self.lowest)) - self.mantissa
        steps = np.rint(np.ldexp(np.where(np.isfinite(exact), exact, 0.0), -quantum)).astype(np.int64)
        # Steps count from zero within a binade: a carry out of the mantissa becomes the next exponent by itself.
        code = steps + ((quantum + self.mantissa - self.lowest) << self.mantissa)
        code = np.where(exact > self.decode_one(self.top), self.top, np.minimum(code, self.top))
        code = np.where(np.signbit(values), code | 0x80, code)
        return np.where(np.isnan(values), 0x7F, code).astype(np.uint8)

    def decode_one(self, code: int) -> float:
        exponent, steps = code >> self.mantissa & (0x7F >> self.mantissa), code & ((1 << self.mantissa) - 1)
        steps += (exponent > 0) << self.mantissa
        return float(np.ldexp(steps, max(exponent - 1, 0) + self.lowest - self.mantissa))

    def table(self) -> Array:
        """The fp16 value of every code."""
        values = np.full(128, np.nan, np.float16)
        values[: self.top + 1] = [self.decode_one(code) for code in range(self.top + 1)]
        if self.mantissa == 2:
            values[self.top + 1] = np.inf
        return canonical(np.concatenate([values, np.copysign(values, np.float16(-1))]))


FP8: Mapping[str, SmallFloat] = MappingProxyType(
    {
        "e4m3x2": SmallFloat(mantissa=3, lowest=-6, top=0x7E),
        "e5m2x2": SmallFloat(mantissa=2, lowest=-14, top=0x7B),
    }
)


def _clamp(target: str) -> Callable[[Array], Array]:
    limits = np.iinfo(dtype(target))

    def clamp(a: Array) -> Array:
        low = limits.min if a.dtype.kind == "i" and limits.min > np.iinfo(a.dtype).min else None
        low = 0 if limits.min == 0 and a.dtype.kind == "i" else low
        high = limits.max if limits.max < np.iinfo(a.dtype).max else None
        return (a if low is None and high is None else np.clip(a, low, high)).astype(dtype(target))

    return clamp


def _to_integer(target: str, source: str, rounding: Any) -> Callable[[Array], Array]:
    """Clamps; NaN is zero, or the highest bit where either side has 64 bits."""
    kind, limits = dtype(target), np.iinfo(dtype(target))
    wide = source == "f64" or bits(target) == 64
    nan = (1 << (bits(target) - 1)) - (1 << bits(target) if target[0] == "s" else 0) if wide else 0
    above = 2.0 ** (bits(target) - (target[0] == "s"))

    def convert(a: Array) -> Array:
        value = rounding((widen(a) if source == "bf16" else np.asarray(a)).astype(np.float64))
        inside = (value >= float(limits.min)) & (value < above)
        result = np.where(inside, value, 0.0).astype(kind)
        result = np.where(value >= above, kind.type(limits.max), result)
        result = np.where(value < float(limits.min), kind.type(limits.min), result)
        return np.where(np.isnan(value), kind.type(nan), result)

    return convert


def _cast(target: str, *, saturate: bool = False) -> Callable[[Array], Array]:
    kind = _clamp(target) if saturate else None
    return kind or (lambda a: a.astype(dtype(target)))


def _integers() -> Iterator[tuple[str, Operation]]:
    for target in _INTEGERS:
        for source in _INTEGERS:
            for word, saturate in (("", False), (".sat", True)):
                yield (
                    f"cvt{word}.{target}.{source}",
                    Operation(
                        result=target, sources=(source,), function=_cast(target, saturate=saturate), wide=True
                    ),
                )
        for source in ("f16", "bf16", "f32", "f64"):
            for word, rounding in _ROUND.items():
                function = _to_integer(target, source, rounding)
                yield (
                    f"cvt.{word}.{target}.{source}",
                    Operation(result=target, sources=(source,), function=function, wide=True),
                )
    for target in ("f32", "f64"):
        for source in _INTEGERS:
            yield (
                f"cvt.rn.{target}.{source}",
                Operation(result=target, sources=(source,), function=_cast(target), wide=True),
            )


def _floats() -> Iterator[tuple[str, str, str, Callable[..., Array]]]:
    for t in ("f16", "f32", "f64"):
        for word, rounding in _ROUND.items():
            yield f"cvt.{word}.{t}.{t}", t, t, lambda a, f=rounding: canonical(f(a))
    yield "cvt.rn.f16.f32", "f16", "f32", lambda a: canonical(a.astype(np.float16))
    yield "cvt.f32.f16", "f32", "f16", lambda a: canonical(a.astype(np.float32))
    yield "cvt.f64.f32", "f64", "f32", lambda a: canonical(a.astype(np.float64))
    yield "cvt.rn.f32.f64", "f32", "f64", lambda a: canonical(a.astype(np.float32))
    yield "cvt.rn.bf16.f32", "bf16", "f32", round_bf16
    yield "cvt.f32.bf16", "f32", "bf16", lambda a: canonical(widen(a))


def _finite_bf16(values: Array) -> Array:
    """Infinity, and what would round to it, becomes the largest finite number; NaN stays one."""
    bits = round_bf16(values)
    return np.where(bits & 0x7FFF == 0x7F80, bits - np.uint16(1), bits).astype(np.uint16)


def _both(encode: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Two values to a pair, the first in the upper half."""
    return lambda high, low: np.stack(np.broadcast_arrays(encode(low), encode(high)), axis=-1)


def _pairs() -> Iterator[tuple[str, str, tuple[str, ...], Callable[..., Array]]]:
    yield "cvt.rn.bf16x2.f32", "bf16x2", ("f32", "f32"), _both(round_bf16)
    yield "cvt.rn.satfinite.bf16x2.f32", "bf16x2", ("f32", "f32"), _both(_finite_bf16)
    yield "cvt.rn.f16x2.f32", "f16x2", ("f32", "f32"), _both(lambda a: canonical(a.astype(np.float16)))
    for name, form in FP8.items():
        table = form.table()
        yield f"cvt.rn.satfinite.{name}.f32", name, ("f32", "f32"), _both(form.encode)
        yield f"cvt.rn.satfinite.{name}.f16x2", name, ("f16x2",), form.encode
        yield f"cvt.rn.f16x2.{name}", "f16x2", (name,), lambda a, t=table: t[a]


def _pack(target: str) -> Operation:
    """cvt.pack: c shifted up by two values, a and b below; b is the lowest."""
    width = bits(target)
    clamp = _clamp(target)

    def pack(a: Array, b: Array, c: Array) -> Array:
        high, low = (clamp(np.asarray(x)).astype(f"u{width // 8}").astype(np.uint32) for x in (a, b))
        rest = np.asarray(c, np.uint32) << np.uint32(16) if width == 8 else np.uint32(0)
        return rest | high << np.uint32(width) | low

    return Operation(result="b32", sources=("s32", "s32", "b32"), function=pack)


def operations() -> Iterator[tuple[str, Operation]]:
    """Spelling and meaning of every conversion."""
    yield from _integers()
    for name, result, source, function in _floats():
        yield name, Operation(result=result, sources=(source,), function=function)
    for name, result, sources, function in _pairs():
        yield name, Operation(result=result, sources=sources, function=function)
    for target in ("u8", "s8"):
        yield f"cvt.pack.sat.{target}.s32.b32", _pack(target)
