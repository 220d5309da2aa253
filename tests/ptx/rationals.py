"""Rounding stated with fractions: what the executor's floats are compared with. Slow, and nothing of it is numpy's."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

__all__ = ["FORMATS", "Format"]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A binary format of ``exponent`` and ``mantissa`` bits.

    ``finite``: e4m3's, whose only NaN is all ones and which has no infinity.
    """

    exponent: int
    mantissa: int
    finite: bool = False

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent) - 1) << self.mantissa

    @property
    def largest(self) -> int:
        """The code of the largest finite value."""
        return self.infinity + (1 << self.mantissa) - 2 if self.finite else self.infinity - 1

    @property
    def sign(self) -> int:
        return 1 << (self.exponent + self.mantissa)

    def is_nan(self, code: int) -> bool:
        return (code & (self.sign - 1)) > (self.largest if self.finite else self.infinity)

    def is_infinite(self, code: int) -> bool:
        return not self.finite and (code & (self.sign - 1)) == self.infinity

    def value(self, code: int) -> Fraction:
        """Of a finite code."""
        field, low = code >> self.mantissa & ((1 << self.exponent) - 1), code & ((1 << self.mantissa) - 1)
        whole = low + (bool(field) << self.mantissa)
        scale = max(field, 1) - self.bias - self.mantissa
        return (-1 if code & self.sign else 1) * Fraction(whole) * Fraction(2) ** scale

    def round(self, exact: Fraction, *, negative_zero: bool = False, saturate: bool = False) -> int:
        """The code nearest to ``exact``, ties to the even one; by bisection in the ordered codes."""
        magnitude = abs(exact)
        low, high = 0, self.largest + 1  # high stands for what would be the next value
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.value(middle) <= magnitude else (low, middle)
        step = self.value(self.largest) - self.value(self.largest - 1)
        above = self.value(high) if high <= self.largest else self.value(self.largest) + step
        down, up = magnitude - self.value(low), above - magnitude
        code = high if up < down or (up == down and low & 1) else low
        if code > self.largest:
            code = self.largest if saturate else self.infinity
        return code | (self.sign if exact < 0 or (exact == 0 and negative_zero) else 0)


FORMATS = {
    "f16": Format(exponent=5, mantissa=10),
    "bf16": Format(exponent=8, mantissa=7),
    "f32": Format(exponent=8, mantissa=23),
    "e4m3": Format(exponent=4, mantissa=3, finite=True),
    "e5m2": Format(exponent=5, mantissa=2),
}
