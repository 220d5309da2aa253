"""Steps 4 and 6 of 7 on the device: fp16 and bf16, the oracle's bytes. `codes` has the kernels that call this.

Phases of write
    1  flag         a value that is not finite raises the payload's
    2  code         half to even, in integers (bf16) or by adding a power of two (fp16); too large takes the largest
    3  write        residual, codes; the program's share of the checksum by one atomic addition
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from hybridcomm.kernels.triton.jit import bits

__all__ = ["values", "write"]

FP16_LARGEST = tl.constexpr(65504.0)
FP16_LEAST_NORMAL = tl.constexpr((127 - 14) << 23)  # bits of fp32


@triton.jit
def _coded(acc, MANTISSA: tl.constexpr):  # noqa: N803
    """Codes in the high halves of 32 bits, and their values."""
    if MANTISSA == 7:
        code = bits.narrowed(acc)
        value = bits.as_float(code)
    else:
        sign = bits.as_bits(acc) & -0x80000000
        size = tl.minimum(tl.abs(acc), FP16_LARGEST)
        exponent = tl.maximum(bits.as_bits(size), FP16_LEAST_NORMAL) & bits.INF
        step = bits.as_float(exponent + (13 << 23))  # its last digit is worth one code
        size = (size + step) - step
        # With the format's smallest normal value moved to fp32's, exponents and denormals of the two agree.
        code = bits.as_bits(size * 2.0**-112) * 8 + sign
        value = bits.as_float(bits.as_bits(size) | sign)
    return code, value


@triton.jit
def _values(code, MANTISSA: tl.constexpr):  # noqa: N803
    """The values of codes in the high halves."""
    value = bits.as_float(code)
    if MANTISSA == 10:
        value = bits.as_float((code >> 3) & (-0x80000000 | (0x7FFF << 13))) * 2.0**112
    return value


@triton.jit
def _word_places(payload, pid, codes, ELEMENTS: tl.constexpr):  # noqa: N803
    """Of words of two codes, (rows, spans, lanes, 2): their number in the tile, in the payload, and a pointer."""
    local = bits.words(ELEMENTS)[:, :, :, None] * 2 + tl.arange(0, 2)[None, None, None, :]
    at = codes * 4 + pid.to(tl.int32) * (ELEMENTS // 2) + local
    return local, at, tl.multiple_of(payload.to(tl.pointer_type(tl.int32)), 16) + at


@triton.jit
def write(  # noqa: PLR0917
    acc, flags, e_out, payload, pid, at, count, codes,
    ELEMENTS: tl.constexpr, MANTISSA: tl.constexpr, HAS_OUT: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Phases 2 and 3."""
    largest = bits.largest_of_four(acc)
    bits.raise_flag(payload, flags, tl.max(tl.reshape(largest, [largest.numel]), 0))
    code, value = _coded(acc, MANTISSA)
    if HAS_OUT:
        bits.store_rest(e_out, at, acc - value, count, MANTISSA == 7, WHOLE)
    a, b, c, d = bits.four(code.to(tl.uint32, bitcast=True))
    word = tl.join((a >> 16) + b, (c >> 16) + d).to(tl.int32, bitcast=True)
    local, word_at, place = _word_places(payload, pid, codes, ELEMENTS)
    if WHOLE:
        tl.store(place, word)
    else:  # zeros up to the section's end
        tl.store(place, word, mask=local < tl.cdiv(count, 8) * 4)
    bits.add_checksum(payload, tl.sum(tl.sum(bits.word_share(word, word_at), 3), 0), 0)


@triton.jit
def values(  # noqa: PLR0917
    payload, pid, inside, codes, weight,
    ELEMENTS: tl.constexpr, MANTISSA: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """``weight`` times a payload's part of the tile, (rows, spans, lanes, VECTOR)."""
    at = bits.tile(ELEMENTS, VECTOR)
    place = payload.to(tl.pointer_type(tl.int16)) + codes * 8 + pid * ELEMENTS + at
    code = tl.load(place) if WHOLE else tl.load(place, mask=at < inside, other=0)
    return _values(code.to(tl.int32) << 16, MANTISSA) * weight
