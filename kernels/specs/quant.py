"""The quantising codecs as data: casts, groups that share a power of two, and signs; docs/payload.md has the prose.

Sections:

    cast    [ codes, 16 bits an element ]
    group   [ scales, one u8 per group ][ codes, 8 or 4 bits an element ]
    sign    [ scales, one bf16 per group ][ codes, one bit an element ]
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from hybridcomm.kernels.payload import HEADER_NBYTES, Codec, SpecError, align

__all__ = ["CastSpec", "Fp8Spec", "IntegerSpec", "QuantSpec", "ScaledSpec", "SignSpec"]

MIN_GROUP, MAX_GROUP = 16, 4096
CAST_BLOCK = 16  # elements; casts have no groups, a region begins at a cache line


class QuantSpec:
    """What the families of this file share."""

    codec: Codec
    block: int
    value_bits: int
    variant = 0
    scale_nbytes: ClassVar[int]

    whole_region = False
    seeded = False
    unbiased = False
    summable = False

    @property
    def params(self) -> tuple[int, int, int, int, int]:
        """``(codec, value_bits, variant, block, k)``."""
        return self.codec, self.value_bits, self.variant, self.block, 0

    def nblocks(self, numel: int) -> int:
        return -(-numel // self.block)

    def codes_offset(self, numel: int) -> int:
        """First byte of the codes, a multiple of 16."""
        return HEADER_NBYTES + align(self.scale_nbytes * self.nblocks(numel))

    def codes_nbytes(self, numel: int) -> int:
        return -(-numel * self.value_bits // 8)

    def nbytes(self, numel: int) -> int:
        """Bytes of the payload of ``numel`` elements, a multiple of 16."""
        return self.codes_offset(numel) + align(self.codes_nbytes(numel))


@dataclass(frozen=True, kw_only=True)
class CastSpec(QuantSpec):
    """fp16 or bf16, rounded half to even; what is too large becomes the largest finite value."""

    codec: Codec

    block = CAST_BLOCK
    value_bits = 16
    scale_nbytes = 0

    @property
    def contraction(self) -> float | None:
        """bf16: half a unit in the last of 8 digits. fp16: None, for it sends nothing of what is below 2^-25."""
        return 1.0 - 2.0**-16 if self.codec is Codec.BF16 else None

    def __str__(self) -> str:
        return self.codec.name.lower()

    @classmethod
    def parse(cls, text: str) -> CastSpec:
        """``fp16`` or ``bf16``, which have no settings."""
        if text not in ("fp16", "bf16"):
            raise SpecError(f"{text!r}: write fp16 or bf16, which have no settings")
        return cls(codec=Codec[text.upper()])


def _check_group(group: int) -> None:
    if not MIN_GROUP <= group <= MAX_GROUP or group & (group - 1):
        raise SpecError(f"group={group}: use a power of two from {MIN_GROUP} to {MAX_GROUP}")


def _parse_group(name: str, default: int, text: str) -> int:
    match = re.fullmatch(rf"{name}(?:/g(\d+))?", text)
    if match is None:
        raise SpecError(f"{text!r}: write {name} or {name}/g{default}")
    return default if match[1] is None else int(match[1])


def _contraction(top: float, lost: float, small: float, group: int) -> float:
    """Of a group whose largest element is at least ``top`` and loses at most ``lost`` (squared) of itself there.

    In units of the scale. Every other element loses at most min(x^2, small), or a share of x^2 that is no
    larger than ``lost / top^2``. Call R what is claimed below, so R >= lost / top^2. Then an element's loss
    minus R x^2 is at most (1 - R) small, and the largest one's at most lost - R top^2: the sum over the group
    is at most lost - R top^2 + (group - 1) (1 - R) small, which is zero for
    R = (lost + (group - 1) small) / (top^2 + (group - 1) small).
    """
    rest = (group - 1) * small
    return 1.0 - (lost + rest) / (top * top + rest)


class ScaledSpec(QuantSpec):
    """Codes in units of a power of two, one per group, so that the largest magnitude is 2^top units or more."""

    scale_nbytes = 1

    @property
    def top(self) -> int:
        """The largest magnitude of a group is 2^top to 2^(top + 1) scales."""
        raise NotImplementedError

    @property
    def max_scale(self) -> int:
        """Largest scale byte an encoder writes; 1 is the smallest."""
        return 254 - self.top


@dataclass(frozen=True, kw_only=True)
class IntegerSpec(ScaledSpec):
    """Integers of 8 or 4 bits in units of a power of two, one per group of ``block`` elements."""

    value_bits: int = 8
    block: int = 128
    codec: Codec = field(init=False, repr=False, default=Codec.INT8)

    def __post_init__(self) -> None:
        _check_group(self.block)
        if self.value_bits not in (4, 8):
            raise SpecError(f"value_bits={self.value_bits}: use 8 or 4")
        object.__setattr__(self, "codec", Codec.INT8 if self.value_bits == 8 else Codec.INT4)

    @property
    def qmax(self) -> int:
        """Largest magnitude of a code; -qmax - 1 is reserved."""
        return (1 << (self.value_bits - 1)) - 1

    @property
    def top(self) -> int:
        """The largest magnitude of a group is 2^top to 2^(top + 1) scales."""
        return self.value_bits - 2

    @property
    def contraction(self) -> float:
        """d in |x - C(x)|^2 <= (1 - d) |x|^2 for every group whose largest element is >= 2^(top - 126).

        Rounding loses at most half a scale; the clamp less than a whole one, of the largest or of an element
        as large, which is at least 15/8 tops: less than the share that `_contraction` allows.
        """
        return _contraction(2.0**self.top, 1.0, 0.25, self.block)

    def __str__(self) -> str:
        return f"int{self.value_bits}/g{self.block}"

    @classmethod
    def parse(cls, text: str) -> IntegerSpec:
        """``int8``, ``int8/g128``, ``int4``, ``int4/g32``."""
        bits, default = (8, 128) if text.startswith("int8") else (4, 32)
        return cls(value_bits=bits, block=_parse_group(f"int{bits}", default, text))


@dataclass(frozen=True, kw_only=True)
class Fp8Spec(ScaledSpec):
    """Floating point of 8 bits in units of a power of two, one per group: ``variant`` 0 is e4m3, 1 is e5m2."""

    block: int = 128
    variant: int = 0

    codec = Codec.FP8
    value_bits = 8

    def __post_init__(self) -> None:
        _check_group(self.block)
        if self.variant not in (0, 1):
            raise SpecError(f"variant={self.variant}: use 0 for e4m3 or 1 for e5m2")

    @property
    def mantissa(self) -> int:
        return 3 - self.variant

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal value."""
        return (-6, -14)[self.variant]

    @property
    def top(self) -> int:
        """As everywhere, and so below the format's largest value."""
        return (7, 14)[self.variant]

    @property
    def contraction(self) -> float:
        """d in |x - C(x)|^2 <= (1 - d) |x|^2 for every group whose largest element is >= 2^(top - 126).

        A value of the normal range loses at most 2^-(mantissa + 1) of itself, where it is cut to the largest
        code too; below that range half a step is lost at most.
        """
        share, half = 4.0 ** -(self.mantissa + 1), 2.0 ** (self.emin - self.mantissa - 1)
        return _contraction(2.0**self.top, share * 4.0**self.top, half * half, self.block)

    def __str__(self) -> str:
        return f"fp8:{('e4m3', 'e5m2')[self.variant]}/g{self.block}"

    @classmethod
    def parse(cls, text: str) -> Fp8Spec:
        """``fp8``, ``fp8:e5m2``, ``fp8:e4m3/g128``."""
        match = re.fullmatch(r"fp8(?::(e4m3|e5m2))?(?:/g(\d+))?", text)
        if match is None:
            raise SpecError(f"{text!r}: write fp8, fp8:e5m2 or fp8:e4m3/g128")
        form, group = match.groups()
        return cls(variant=int(form == "e5m2"), block=cls.block if group is None else int(group))


@dataclass(frozen=True, kw_only=True)
class SignSpec(QuantSpec):
    """One bit an element and the mean magnitude of each group of ``block`` elements."""

    block: int = 256

    codec = Codec.SIGN1
    value_bits = 1
    scale_nbytes = 2

    def __post_init__(self) -> None:
        _check_group(self.block)

    @property
    def contraction(self) -> float:
        """d in |x - C(x)|^2 <= (1 - d) |x|^2 for every group whose largest element is >= 2^-105.

        With s = t m, m the true mean magnitude, the loss is |x|^2 - (2 t - t^2) n m^2, and n m^2 >= |x|^2 / n
        (one element alone). Cutting magnitudes to 22 bits below the largest and the mean to a whole unit
        takes less than n / 2^20 of m, cutting to 8 digits 2^-7 of that, so 1 - t < 2^-6 for n <= 4096.
        """
        return (1.0 - 2.0**-12) / self.block

    def __str__(self) -> str:
        return f"sign1/g{self.block}"

    @classmethod
    def parse(cls, text: str) -> SignSpec:
        """``sign1``, ``sign1/g256``."""
        return cls(block=_parse_group("sign1", cls.block, text))
