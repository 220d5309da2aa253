"""Steps 4 and 6 of 7 on the device: one bit per element, the oracle's bytes. `codes` has the kernels that call this.

Phases of write
    1  flag         a value that is not finite raises the payload's
    2  scale        per group, the mean magnitude: a sum of integers, cut to 8 binary digits
    3  pack         signs: four per vector, 32 per thread, then exchanged between lanes so that each holds one word
    4  write        residual, scales, words; the program's share of the checksum by one atomic addition
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from hybridcomm.kernels.triton.jit import bits

__all__ = ["values", "write"]

FIXED = tl.constexpr(22)  # as the oracle: bits of a magnitude that the mean takes in


@triton.jit
def _exchange(x, BIT: tl.constexpr, LOW: tl.constexpr):  # noqa: N803
    """Of words (spans, 8): swaps bit BIT of a nibble's number in its word with that of its word's number.

    LOW has the nibbles whose number has a zero there.
    """
    size: tl.constexpr = 1 << BIT
    pairs = tl.reshape(x, [x.shape[0], 4 // size, 2, size])
    other = tl.sum(pairs, 2, keep_dims=True) - pairs
    first = tl.arange(0, 2)[None, None, :, None] == 0
    low: tl.constexpr = LOW
    kept = tl.where(first, low, ~low)
    up = other << (4 * size)
    down = (other.to(tl.uint32, bitcast=True) >> (4 * size)).to(tl.int32, bitcast=True)
    moved = up | down if BIT == 2 else tl.where(first, up, down)  # halves are swapped by one rotation
    return tl.reshape((pairs & kept) | (moved & ~kept), x.shape)


@triton.jit
def _transposed(x):
    """Eight nibbles of eight lanes each, as a matrix."""
    return _exchange(_exchange(_exchange(x, 0, 0x0F0F0F0F), 1, 0x00FF00FF), 2, 0x0000FFFF)


@triton.jit
def _packed(acc):
    """Signs of (rows, spans, lanes, 4) as words (spans, 8), the first element's lowest."""
    a, b, c, d = bits.four(bits.as_bits(acc).to(tl.uint32, bitcast=True))
    nibble = d >> 31
    nibble = (nibble << 1) | (c >> 31)
    nibble = (nibble << 1) | (b >> 31)
    nibble = (nibble << 1) | (a >> 31)
    row = tl.arange(0, bits.ROWS)[:, None, None]
    return _transposed(tl.sum(nibble.to(tl.int32, bitcast=True) << (4 * row), 0))


@triton.jit
def _quotient(total, size):
    """``total // size``, below 2^(FIXED + 1), digit by digit: a division would begin with an approximate reciprocal."""
    whole = total * 0
    for i in tl.static_range(FIXED, -1, -1):
        part = size.to(total.dtype) << i
        more = part <= total
        total = tl.where(more, total - part, total)
        whole = tl.where(more, whole | (1 << i), whole)
    return whole


@triton.jit
def _mean_bits(acc, largest, count, ELEMENTS: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr):  # noqa: N803
    """fp32 bits of the mean magnitude of each group, towards zero, in 8 binary digits."""
    n: tl.constexpr = ELEMENTS // GROUP
    exponent = tl.maximum(largest & bits.INF, FIXED << 23)
    # 2^(126 + FIXED - e) has the biased exponent 253 + FIXED - e; the sum wraps and the difference is right again.
    units = bits.as_float(-exponent + (((253 + FIXED) << 23) - (1 << 32)))
    fixed = tl.sum((tl.abs(acc) * bits.spread(units, ELEMENTS)).to(tl.int32), 3)
    if GROUP > 256:  # of 22 bits each
        fixed = fixed.to(tl.int64)
    total = tl.sum(bits.groups(fixed, n), 1)
    if WHOLE:
        unsigned: tl.constexpr = (
            tl.uint64 if GROUP > 256 else tl.uint32
        )  # divided by a shift, and nothing more
        whole = total.to(unsigned, bitcast=True) // GROUP
    else:
        whole = _quotient(total, tl.minimum(tl.maximum(count - tl.arange(0, n) * GROUP, 1), GROUP))
    digits = bits.as_float(bits.as_bits(whole.to(tl.int32).to(tl.float32)) & -65536)
    return bits.as_bits(digits * bits.as_float(exponent - ((FIXED - 1) << 23)))


@triton.jit
def _word_places(payload, pid, codes, ELEMENTS: tl.constexpr):  # noqa: N803
    """Of words (spans, 8): their number in the tile, in the payload, and a pointer."""
    span = tl.arange(0, ELEMENTS // bits.SPAN)[:, None] * bits.LANES
    local = span + tl.arange(0, bits.LANES)[None, :]
    at = codes * 4 + pid.to(tl.int32) * (ELEMENTS // 32) + local
    return local, at, payload.to(tl.pointer_type(tl.int32)) + at


@triton.jit
def write(  # noqa: PLR0917
    acc, flags, e_out, payload, pid, at, count, codes,
    ELEMENTS: tl.constexpr, GROUP: tl.constexpr, HAS_OUT: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Phases 2 to 4."""
    n: tl.constexpr = ELEMENTS // GROUP
    largest = tl.max(bits.groups(bits.largest_of_four(acc), n), 1)
    bits.raise_flag(payload, flags, tl.max(largest, 0))
    mean = _mean_bits(acc, largest, count, ELEMENTS, GROUP, WHOLE)
    if HAS_OUT:
        value = bits.as_float((bits.as_bits(acc) & -0x80000000) | bits.spread(mean, ELEMENTS))
        bits.store_rest(e_out, at, acc - value, count, False, WHOLE)

    scale = mean >> 16
    j = tl.arange(0, n)
    half = (pid * n + bits.SCALES // 2).to(tl.int32) + j
    word = _packed(acc)
    local, word_at, place = _word_places(payload, pid, codes, ELEMENTS)
    scales = payload.to(tl.pointer_type(tl.int16)) + half
    if WHOLE:
        tl.store(scales, scale.to(tl.int16))
        tl.store(place, word)
    else:  # zeros up to the sections' ends
        tl.store(scales, scale.to(tl.int16), mask=j < tl.cdiv(count, 8 * GROUP) * 8)
        tl.store(place, word, mask=local < tl.cdiv(count, 128) * 4)
    share = bits.with_first(bits.word_share(word, word_at), bits.half_share(scale, half))
    bits.add_checksum(payload, share, 0)


@triton.jit
def values(  # noqa: PLR0917
    payload, pid, inside, codes, weight,
    ELEMENTS: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr, FIRST: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """``weight`` times a payload's part of the tile, (rows, spans, lanes, VECTOR); FIRST: plus zero."""
    first = bits.vectors(ELEMENTS, VECTOR)
    # A byte has the signs of a vector, or of two.
    place = payload + codes * 16 + pid * (ELEMENTS // 8) + bits.vectors(ELEMENTS, VECTOR, 8)
    scales = payload.to(tl.pointer_type(tl.int16)) + bits.SCALES // 2
    scales += pid * (ELEMENTS // GROUP) + first // GROUP
    if WHOLE:
        byte, scale = tl.load(place), tl.load(scales)
    else:
        byte = tl.load(place, mask=first < inside, other=0)
        scale = tl.load(scales, mask=first < inside, other=0)
    value = bits.as_float(scale.to(tl.int32) << 16) * weight  # rounding knows no sign: it may come later
    sign = -0x80000000
    if FIRST:  # plus zero only a negative zero becomes another number
        sign = tl.where(value == 0.0, 0, sign)
        value = tl.where(value == 0.0, 0.0, value)
    left = 31 - (first & 7) - tl.arange(0, VECTOR)[None, None, None, :]
    return bits.as_float(((byte.to(tl.int32) << left) & sign) ^ bits.as_bits(value))
