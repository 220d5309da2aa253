"""Steps 4 and 6 of 7 on the device: int8, int4 and fp8, the oracle's bytes. `codes` has the kernels that call this.

Phases of write
    1  flag         a value that is not finite raises the payload's
    2  scale        per group, the power of two that the largest magnitude's exponent says
    3  code         half to even, by adding a power of two whose last digit is worth one code
    4  write        residual, scales, codes; the program's share of the checksum by one atomic addition
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from hybridcomm.kernels.triton.jit import bits

__all__ = ["values", "write"]

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23, bits 0x4B400000: what is added to it is rounded to an integer


@triton.jit
def _scale_bits(largest, TOP: tl.constexpr):  # noqa: N803
    """fp32 bits of each group's scale: the largest magnitude's exponent less TOP, and at least 1."""
    return tl.maximum((largest & bits.INF) - (TOP << 23), 1 << 23)


@triton.jit
def _integers(acc, scale_bits, BITS: tl.constexpr):  # noqa: N803
    """Codes, packed by four, and their values in units of the scale."""
    q_max: tl.constexpr = (1 << (BITS - 1)) - 1
    rounded = acc * bits.as_float(0x7F000000 - scale_bits) + MAGIC
    rounded = tl.minimum(tl.maximum(rounded, MAGIC - q_max), MAGIC + q_max)
    a, b, c, d = bits.four(bits.as_bits(rounded))
    # Each is 0x4B400000 + code. Codes are packed with 2^(BITS - 1) added, so that nothing is borrowed, which is
    # taken off again by inverting each one's highest bit.
    packed = ((d * (1 << BITS) + c) * (1 << BITS) + b) * (1 << BITS) + a
    packed = (packed + (0x00808080 - 0x0B400000 if BITS == 8 else 0x8888)) ^ (
        -0x7F7F7F80 if BITS == 8 else 0x8888
    )
    return packed if BITS == 8 else packed & 0xFFFF, rounded - MAGIC


@triton.jit
def _floats(acc, scale_bits, MANTISSA: tl.constexpr):  # noqa: N803
    """Likewise of fp8: adding 2^(23 - MANTISSA) times its own power of two rounds an element to MANTISSA digits."""
    e_min: tl.constexpr = -6 if MANTISSA == 3 else -14
    largest: tl.constexpr = 240.0 if MANTISSA == 3 else 28672.0  # code 0x77
    size = tl.abs(acc) * bits.as_float(0x7F000000 - scale_bits)
    size = tl.minimum(size, largest)
    exponent = tl.maximum(bits.as_bits(size), (127 + e_min) << 23) & bits.INF
    step = bits.as_float(exponent + ((23 - MANTISSA) << 23))
    size = (size + step) - step
    sign = bits.as_bits(acc) & -0x80000000
    # With the format's smallest normal value moved to fp32's, exponents and denormals of the two agree.
    code = bits.as_bits(size * 2.0 ** (-126 - e_min))
    a, b, c, d = bits.four(
        (code * (2 << MANTISSA) + sign).to(tl.uint32, bitcast=True)
    )  # each in the highest byte
    packed = ((((((a >> 8) + b) >> 8) + c) >> 8) + d).to(tl.int32, bitcast=True)
    return packed, bits.as_float(bits.as_bits(size) | sign)


@triton.jit
def write(  # noqa: PLR0917
    acc, flags, e_out, payload, pid, at, count, codes,
    ELEMENTS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr,  # noqa: N803
    HAS_OUT: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Phases 2 to 4."""
    top: tl.constexpr = BITS - 2 if MANTISSA == 0 else (7 if MANTISSA == 3 else 14)
    n: tl.constexpr = ELEMENTS // GROUP
    largest = tl.max(bits.groups(bits.largest_of_four(acc), n), 1)
    bits.raise_flag(payload, flags, tl.max(largest, 0))
    scale_bits = _scale_bits(largest, top)
    wide = bits.spread(scale_bits, ELEMENTS)
    if MANTISSA == 0:
        packed, value = _integers(acc, wide, BITS)
    else:
        packed, value = _floats(acc, wide, MANTISSA)
    if HAS_OUT:
        rest = acc - value * bits.as_float(wide)  # at most 2^125, a digit of the largest code
        bits.store_rest(e_out, at, rest, count, True, WHOLE)

    scales = _store_scales(payload, scale_bits >> 23, pid, count, ELEMENTS, GROUP, WHOLE)
    codes_ = _store_codes(payload, packed, pid, count, codes, ELEMENTS, BITS, WHOLE)
    bits.add_checksum(payload, codes_, tl.sum(scales, 0).to(tl.int64))


@triton.jit
def _store_scales(  # noqa: PLR0917
    payload, scale, pid, count,
    ELEMENTS: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Writes the scales, up to four to an access, and zeros up to the section's end; returns their shares."""
    n: tl.constexpr = ELEMENTS // GROUP
    width: tl.constexpr = 4 if GROUP <= 64 else (2 if GROUP == 128 else 1)
    if not WHOLE:
        scale = tl.where(tl.arange(0, n) * GROUP < count, scale, 0)
    unit = bits.packed_bytes(scale, width)
    j = tl.arange(0, n // width)
    at = (pid * (n // width) + bits.SCALES // width).to(tl.int32) + j
    if width == 4:
        place = payload.to(tl.pointer_type(tl.int32)) + at
        share = bits.word_share(unit, at)
    elif width == 2:
        place = payload.to(tl.pointer_type(tl.int16)) + at
        share = bits.half_share(unit, at)
    else:
        place = payload + at
        share = bits.byte_share(unit, at)
    stored = unit.to(place.dtype.element_ty)
    if WHOLE:
        tl.store(place, stored)
    else:
        tl.store(place, stored, mask=j < tl.cdiv(count, 16 * GROUP) * (16 // width))
    return share


@triton.jit
def _code_places(payload, pid, codes, ELEMENTS: tl.constexpr, BITS: tl.constexpr):  # noqa: N803
    """Where four codes stand: their number in the tile and among the payload's words (or half words), and a pointer."""
    local = bits.words(ELEMENTS)
    at = codes * (4 * 8 // BITS) + pid.to(tl.int32) * (ELEMENTS // 4) + local
    return local, at, payload.to(tl.pointer_type(tl.int32 if BITS == 8 else tl.int16)) + at


@triton.jit
def _store_codes(  # noqa: PLR0917
    payload, packed, pid, count, codes,
    ELEMENTS: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Writes codes, and zeros up to the section's end; returns their share of the checksum, (spans, lanes)."""
    local, at, place = _code_places(payload, pid, codes, ELEMENTS, BITS)
    stored = packed.to(place.dtype.element_ty)
    if WHOLE:
        tl.store(place, stored)
    else:
        tl.store(place, stored, mask=local < tl.cdiv(count * BITS, 128) * (32 // BITS))
    return tl.sum(bits.word_share(packed, at) if BITS == 8 else bits.half_share(packed, at), 0)


@triton.jit
def _codes(  # noqa: PLR0917
    payload, pid, inside, codes,
    ELEMENTS: tl.constexpr, BITS: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """A payload's codes of the tile, int32 with their sign, (rows, spans, lanes, VECTOR)."""
    codes *= 16
    if BITS == 8:
        at = bits.tile(ELEMENTS, VECTOR)
        place = payload.to(tl.pointer_type(tl.int8)) + codes + pid * ELEMENTS + at
        byte = tl.load(place) if WHOLE else tl.load(place, mask=at < inside, other=0)
        code = byte.to(tl.int32)
    else:  # a vector's are a word
        kind: tl.constexpr = tl.int16 if VECTOR == 4 else tl.int32
        first = bits.vectors(ELEMENTS, VECTOR, VECTOR)
        place = (payload + codes + pid * (ELEMENTS // 2)).to(tl.pointer_type(kind)) + first
        word = tl.load(place) if WHOLE else tl.load(place, mask=first * VECTOR < inside, other=0)
        code = (word.to(tl.int32) << (28 - 4 * tl.arange(0, VECTOR)[None, None, None, :])) >> 28
    return code


@triton.jit
def values(  # noqa: PLR0917
    payload, pid, inside, codes, weight,
    ELEMENTS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr,  # noqa: N803
    VECTOR: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """``weight`` times a payload's part of the tile, (rows, spans, lanes, VECTOR), both operations rounded."""
    first = bits.vectors(ELEMENTS, VECTOR)
    scales = payload + bits.SCALES + pid * (ELEMENTS // GROUP) + first // GROUP
    scale = tl.load(scales) if WHOLE else tl.load(scales, mask=first < inside, other=0)
    code = _codes(payload, pid, inside, codes, ELEMENTS, BITS, VECTOR, WHOLE)
    if MANTISSA == 0:
        value = code.to(tl.float32)
    else:
        code = ((code << 24) >> (MANTISSA + 1)) & (-0x80000000 | (0x7F << (23 - MANTISSA)))
        value = bits.as_float(code) * 2.0 ** (120 if MANTISSA == 3 else 112)
    return value * bits.as_float(scale.to(tl.int32) << 23) * weight
