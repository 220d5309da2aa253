"""Steps 4 and 6 of 7 on the device: fp16 and bf16, the oracle's bytes, as Triton kernels.

Phases of encode, in one pass
    1  compensate   acc = grad + decay * e_in in registers; a non-finite value raises the payload's flag
    2  code         half to even, in integers (bf16) or by adding a power of two (fp16); too large takes the largest
    3  write        residual, codes; the program's share of the checksum by one atomic addition
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from hybridcomm.kernels.payload import Codec
from hybridcomm.kernels.specs.quant import CastSpec
from hybridcomm.kernels.triton import bits, launch
from hybridcomm.kernels.triton.launch import Family
from hybridcomm.kernels.triton.shipped import shipped

__all__ = ["FAMILY", "KERNELS", "decode_add", "encode", "reencode"]

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
def _write(  # noqa: PLR0917
    acc, flags, e_out, payload, pid, at, count, codes,
    ELEMENTS: tl.constexpr, MANTISSA: tl.constexpr, HAS_OUT: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Phases 2 and 3."""
    largest = bits.largest_of_four(acc)
    bits.raise_flag(payload, flags, tl.max(tl.reshape(largest, [largest.numel]), 0))
    code, value = _coded(acc, MANTISSA)
    if HAS_OUT:
        bits.store_rest(e_out, at, acc - value, count, WHOLE)
    a, b, c, d = bits.four(code.to(tl.uint32, bitcast=True))
    word = tl.join((a >> 16) + b, (c >> 16) + d).to(tl.int32, bitcast=True)
    local, word_at, place = _word_places(payload, pid, codes, ELEMENTS)
    if WHOLE:
        tl.store(place, word)
    else:  # zeros up to the section's end
        tl.store(place, word, mask=local < tl.cdiv(count, 8) * 4)
    bits.add_checksum(payload, tl.sum(tl.sum(bits.word_share(word, word_at), 3), 0), 0)


@triton.jit
def _sum(  # noqa: PLR0917
    x, payloads, pid, count, stride, inside, codes, weight,
    ELEMENTS: tl.constexpr, MANTISSA: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """x plus ``weight`` times each payload's part of the tile, in the payloads' order, every operation rounded."""
    for w in range(count):
        local, _, place = _word_places(payloads + w * tl.cast(stride, tl.int64), pid, codes, ELEMENTS)
        word = tl.load(place) if WHOLE else tl.load(place, mask=local < tl.cdiv(inside, 2), other=0)
        code = tl.reshape(tl.join(word << 16, word & -65536), x.shape)
        x = x + _values(code, MANTISSA) * weight
    return x


@triton.jit(do_not_specialize=["first", "codes"])
def encode_kernel(  # noqa: PLR0917
    grad, e_in, e_out, payload, numel, first, codes, decay,
    ELEMENTS: tl.constexpr, MANTISSA: tl.constexpr,  # noqa: N803
    VECTOR: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, DECAYED: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Programs ``first``, first + 1, ... of a region."""
    pid = tl.program_id(0).to(tl.int64) + first
    count = bits.count_in(numel, pid, ELEMENTS)
    start = pid * ELEMENTS
    at = bits.tile(ELEMENTS, VECTOR)
    acc = bits.fetch(grad + start, at, count, WHOLE)
    acc = bits.compensated(acc, e_in + start, decay, at, count, HAS_IN, DECAYED, WHOLE)
    _write(acc, 0, e_out + start, payload, pid, at, count, codes, ELEMENTS, MANTISSA, HAS_OUT, WHOLE)


@triton.jit(do_not_specialize=["count", "first", "codes"])
def reencode_kernel(  # noqa: PLR0917
    payloads, e_in, e_out, payload, count, stride, numel, first, codes, weight, decay,
    ELEMENTS: tl.constexpr, MANTISSA: tl.constexpr,  # noqa: N803
    VECTOR: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, DECAYED: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Likewise of the sum of payloads, which is nowhere written."""
    pid = tl.program_id(0).to(tl.int64) + first
    inside = bits.count_in(numel, pid, ELEMENTS)
    start = pid * ELEMENTS
    at = bits.tile(ELEMENTS, VECTOR)
    acc = bits.zeros(ELEMENTS)
    acc = _sum(acc, payloads, pid, count, stride, inside, codes, weight, ELEMENTS, MANTISSA, WHOLE)
    acc = bits.compensated(acc, e_in + start, decay, at, inside, HAS_IN, DECAYED, WHOLE)
    flags = bits.flagged(payloads, count, stride)
    _write(acc, flags, e_out + start, payload, pid, at, inside, codes, ELEMENTS, MANTISSA, HAS_OUT, WHOLE)


@triton.jit(do_not_specialize=["count", "first", "codes"])
def decode_kernel(  # noqa: PLR0917
    payloads, out, count, stride, numel, first, codes, weight,
    ELEMENTS: tl.constexpr, MANTISSA: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """``out`` plus all payloads, or NaN if one is flagged."""
    pid = tl.program_id(0).to(tl.int64) + first
    inside = bits.count_in(numel, pid, ELEMENTS)
    out += pid * ELEMENTS
    at = bits.tile(ELEMENTS, 4)
    if bits.flagged(payloads, count, stride) != 0:
        bits.put(out, at, bits.as_float(at * 0 + bits.QUIET_NAN), inside, WHOLE)
    else:
        x = bits.fetch(out, at, inside, WHOLE)
        x = _sum(x, payloads, pid, count, stride, inside, codes, weight, ELEMENTS, MANTISSA, WHOLE)
        bits.put(out, at, x, inside, WHOLE)


def _constants(spec: CastSpec) -> dict[str, int]:
    return {"MANTISSA": 10 if spec.codec is Codec.FP16 else 7}


FAMILY = Family(
    encode=encode_kernel, reencode=reencode_kernel, decode=decode_kernel, constants=_constants
)  # fmt: skip
encode = partial(launch.encode, FAMILY)
reencode = partial(launch.reencode, FAMILY)
decode_add = partial(launch.decode_add, FAMILY)

KERNELS = shipped("triton/casts.py", FAMILY, ("fp16", "bf16"), instructions=21)
