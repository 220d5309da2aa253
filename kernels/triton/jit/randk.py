"""Steps 4 and 6 of 7 on the device: randk, the oracle's bytes, as Triton kernels.

A program, one warp, takes a block of K strata of ROWS elements. Phases of encode
    1  compensate   acc = grad + decay * e_in, written to e_out as it is; a non-finite value raises the payload's flag
    2  draw         of each stratum one element, by a hash of the header's seed and the stratum's number in the region
    3  quantise     8 bits, a power-of-two scale from what was drawn; unbiased: at random, and ROWS times as large
    4  write        the K residuals that differ, scale, codes; the block's share of the checksum

A stratum's element is found again from the seed in a payload's header, so payloads name different ones. A stratum
belongs to one thread, so payloads are added one after another without a barrier.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-unimported"

from __future__ import annotations

import triton
import triton.language as tl

from hybridcomm.kernels.triton.jit import bits, records

__all__ = ["decode_kernel", "encode_kernel", "reencode_kernel"]

SEED = tl.constexpr(14)  # word of the header
LARGEST_SCALE = tl.constexpr(239)  # of an unbiased payload


@triton.jit
def _mix(x):
    """A bijection of 32 bits: C. Wellons' lowbias32."""
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _hashes(payload, pid, j, K: tl.constexpr):  # noqa: N803
    """Of the block's strata ``j``."""
    seed = payload.to(tl.pointer_type(tl.uint32)) + SEED
    number = pid * K + j
    high = tl.load(seed + 1) ^ ((number >> 32).to(tl.uint32) * tl.full([], 0x9E3779B9, tl.uint32))
    return _mix(_mix(number.to(tl.uint32) ^ tl.load(seed)) + high)


@triton.jit
def _places(hashes, j, ROWS: tl.constexpr):  # noqa: N803
    """Elements of the block that hashes mean."""
    return j * ROWS + tl.umulhi(hashes, tl.full([], ROWS, tl.uint32)).to(tl.int32)


@triton.jit
def _rounded_at_random(
    acc, largest, hashes, ROWS: tl.constexpr, VALUE_BITS: tl.constexpr  # noqa: N803
):  # fmt: skip
    """The scale's exponent, codes as int32, values: the mean of a code is acc / scale, to 16 binary places."""
    exponent = tl.minimum(tl.maximum((largest >> 23) + 3 - VALUE_BITS, 1), LARGEST_SCALE)
    x = tl.minimum(tl.maximum(acc * bits.as_float((254 - exponent) << 23), -127.0), 127.0)
    code = ((x * 65536.0).to(tl.int32) + (_mix(hashes) >> 16).to(tl.int32)) >> 16
    return exponent, code, (code.to(tl.float32) * ROWS) * bits.as_float(exponent << 23)


@triton.jit
def _encode(  # noqa: PLR0917
    grad, e_in, e_out, payload, pid, left, codes_at, decay,
    ROWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, VALUE_BITS: tl.constexpr, UNBIASED: tl.constexpr,  # noqa: N803
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, DECAYED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """All phases for block ``pid``, of ``left`` elements; the pointers but payload's are the block's own."""
    step: tl.constexpr = (
        2048 if e_out.dtype.element_ty == tl.bfloat16 else 512
    )  # as many bytes as registers hold
    most = tl.zeros([step], tl.int32)
    for first in range(0, ROWS * K, step):
        at = first + tl.arange(0, step)
        inside = at < left
        acc = records.compensated(grad, e_in, at, inside, decay, HAS_IN, DECAYED)
        if HAS_OUT:
            records.store_rest(e_out, at, acc, inside)
        most = tl.maximum(most, bits.magnitude(acc))
    bits.raise_flag(payload, 0, tl.max(most, 0))
    j = tl.arange(0, KP)
    hashes = _hashes(payload, pid, j, K)
    place = _places(hashes, j, ROWS)
    real = (j < K) & (place < left)
    if HAS_OUT:
        tl.debug_barrier()  # behind what other threads wrote in phase 1
    if HAS_OUT and e_out.dtype.element_ty == tl.float32:
        kept = tl.load(e_out + place, mask=real, other=0.0)
    else:
        kept = records.compensated(grad, e_in, place, real, decay, HAS_IN, DECAYED)
    largest = tl.max(bits.magnitude(kept), 0)
    if UNBIASED:
        exponent, code, value = _rounded_at_random(kept, largest, hashes, ROWS, VALUE_BITS)
    else:
        exponent, code, value = records.coded(kept, largest, VALUE_BITS)
    if HAS_OUT:
        records.store_rest(e_out, place, kept - value, real)
    code = tl.where(real, code, 0) & 0xFF
    byte = codes_at + pid.to(tl.int32) * K + j
    tl.store(payload + byte, code.to(tl.uint8), mask=j < K)
    tl.store(payload + bits.SCALES + pid, exponent.to(tl.uint8))
    share = bits.byte_share(exponent, pid.to(tl.int32) + bits.SCALES)
    bits.add_checksum(payload, tl.where(j < K, bits.byte_share(code, byte), 0), share.to(tl.int64))


@triton.jit
def _add(  # noqa: PLR0917
    out, payloads, pid, count, stride, left, codes_at, weight,
    ROWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, VALUE_BITS: tl.constexpr, UNBIASED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Adds ``weight`` times block ``pid`` of each payload, in order, to ``out``, the block's own."""
    j = tl.arange(0, KP)
    for w in range(count):
        payload = payloads + w * tl.cast(stride, tl.int64)
        place = _places(_hashes(payload, pid, j, K), j, ROWS)
        inside = (j < K) & (place < left)
        byte = codes_at + pid.to(tl.int32) * K + j
        code = tl.load(payload.to(tl.pointer_type(tl.int8)) + byte, mask=j < K, other=0).to(tl.float32)
        scale = bits.as_float(tl.load(payload + bits.SCALES + pid).to(tl.int32) << 23)
        value = ((code * ROWS) if UNBIASED else code) * scale
        tl.store(out + place, tl.load(out + place, mask=inside, other=0.0) + value * weight, mask=inside)


@triton.jit
def encode_kernel(  # noqa: PLR0917
    grad, e_in, e_out, payload, numel, codes_at, decay,
    ROWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, VALUE_BITS: tl.constexpr, UNBIASED: tl.constexpr,  # noqa: N803
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, DECAYED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """A block of a region per program."""
    size: tl.constexpr = ROWS * K
    pid = tl.program_id(0).to(tl.int64)
    start = pid * size
    _encode(
        grad + start, e_in + start, e_out + start, payload, pid, bits.count_in(numel, pid, size), codes_at, decay,
        ROWS, K, KP, VALUE_BITS, UNBIASED, HAS_IN, HAS_OUT, DECAYED,
    )  # fmt: skip


@triton.jit
def reencode_kernel(  # noqa: PLR0917
    payloads, sums, e_in, e_out, payload, count, stride, numel, codes_at, weight, decay,
    ROWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, VALUE_BITS: tl.constexpr, UNBIASED: tl.constexpr,  # noqa: N803
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, DECAYED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Likewise of the sum of payloads, which is formed in ``sums``; that may be ``e_out``."""
    size: tl.constexpr = ROWS * K
    pid = tl.program_id(0).to(tl.int64)
    start = pid * size
    left = bits.count_in(numel, pid, size)
    flags = bits.flagged(payloads, count, stride)
    if flags != 0:
        bits.raise_flag(payload, flags, 0)
    else:
        records.fill(sums + start, 0, left, size)
        tl.debug_barrier()
        _add(
            sums + start,
            payloads,
            pid,
            count,
            stride,
            left,
            codes_at,
            weight,
            ROWS,
            K,
            KP,
            VALUE_BITS,
            UNBIASED,
        )
        tl.debug_barrier()
        _encode(
            sums + start, e_in + start, e_out + start, payload, pid, left, codes_at, decay,
            ROWS, K, KP, VALUE_BITS, UNBIASED, HAS_IN, HAS_OUT, DECAYED,
        )  # fmt: skip


@triton.jit
def decode_kernel(  # noqa: PLR0917
    payloads, out, count, stride, numel, codes_at, weight,
    ROWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, VALUE_BITS: tl.constexpr, UNBIASED: tl.constexpr,  # noqa: N803
    CLEAR: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """``out`` (CLEAR: zero) plus all payloads, or NaN if one is flagged; a block per program."""
    size: tl.constexpr = ROWS * K
    pid = tl.program_id(0).to(tl.int64)
    left = bits.count_in(numel, pid, size)
    if bits.flagged(payloads, count, stride) != 0:
        records.fill(out + pid * size, bits.QUIET_NAN, left, size)
    else:
        if CLEAR:
            records.fill(out + pid * size, 0, left, size)
            tl.debug_barrier()
        _add(
            out + pid * size,
            payloads,
            pid,
            count,
            stride,
            left,
            codes_at,
            weight,
            ROWS,
            K,
            KP,
            VALUE_BITS,
            UNBIASED,
        )
