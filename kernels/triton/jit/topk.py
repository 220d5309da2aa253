"""Steps 4 and 6 of 7 on the device: block-wise top-k, the oracle's bytes, as Triton kernels.

For all settings and architectures; ``cuda/topk.cu`` has a faster encoder for the default. A program takes a block.
Phases of encode
    1  compensate   acc = grad + decay * e_in in registers; a non-finite value raises the payload's flag
    2  bound        the k-th largest of the maxima of four neighbours: k elements reach it, rarely many more
    3  select       bisect all elements to the k-th; ties to the lowest index
    4  gather       indices of the kept to where their records belong, then these elements alone once more
    5  quantise     power-of-two scale; rounding by adding 1.5 * 2^23. Signs: the scale by the mean, in integers
    6  write        residual, scale, records; the block's share of the checksum by one atomic addition
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-unimported"

from __future__ import annotations

import triton
import triton.language as tl

from hybridcomm.kernels.specs.topk import SIGN_BITS
from hybridcomm.kernels.triton.jit import bits, records

__all__ = ["decode_kernel", "encode_kernel", "reencode_kernel"]

SIGNS = tl.constexpr(SIGN_BITS)


@triton.jit
def _reached(key, threshold):
    """How many keys are at or above it: by signs of differences, where comparing would be packed into words first."""
    return key.shape[0] + tl.sum((key - threshold) >> 31, 0)


@triton.jit
def _bisect(key, low, high, n, K: tl.constexpr):  # noqa: N803
    """From ``n`` = reached(low) >= K > reached(high) to a threshold that K keys reach, or the K-th largest key."""
    while (n != K) & (high - low > 1):
        middle = low + ((high - low) >> 1)
        m = _reached(key, middle)
        low = tl.where(m >= K, middle, low)
        n = tl.where(m >= K, m, n)
        high = tl.where(m >= K, high, middle)
    return low, n


@triton.jit
def _bound(key, largest, K: tl.constexpr):  # noqa: N803
    """A threshold that at least K keys reach, no higher than needed: gallop down from the largest, then bisect."""
    high = largest + 1
    step = largest * 0 + (1 << 22)
    low = tl.maximum(high - step, 0)
    n = _reached(key, low)
    while n < K:
        high = low
        step = step * 2
        low = tl.maximum(high - step, 0)
        n = _reached(key, low)
    low, n = _bisect(key, low, high, n, K)
    return low


@triton.jit
def _place(key, threshold, n, to, K: tl.constexpr):  # noqa: N803
    """Phase 4: the kept elements' indices to ``to`` and behind, ascending; ``n`` keys reach the threshold."""
    index = tl.arange(0, key.shape[0]).to(tl.int16)
    if n == K:
        reached = (key >= threshold).to(tl.int32)
        tl.store(to + tl.cumsum(reached, 0) - 1, index, mask=reached == 1)
    else:
        above = (key > threshold).to(tl.int32)
        equal = (key == threshold).to(tl.int32)
        both = (above << 16) | equal
        before = tl.cumsum(both, 0) - both
        need = K - tl.sum(above, 0)
        kept = (above == 1) | ((equal == 1) & ((before & 0xFFFF) < need))
        tl.store(to + (before >> 16) + tl.minimum(before & 0xFFFF, need), index, mask=kept)


@triton.jit
def _signed(acc, largest):
    """The scale's exponent, -1, 0 or 1 as int32, and values: as ``oracles.topk.quantise_signs``."""
    key = bits.magnitude(acc)
    exponent = tl.maximum(largest >> 23, 1)
    mantissa = (key & 0x7FFFFF) | (tl.minimum(key >> 23, 1) << 23)
    lost = tl.minimum(exponent - tl.maximum(key >> 23, 1), 63)
    total = 4 * tl.sum((mantissa.to(tl.int64) << 16) >> lost.to(tl.int64), 0)
    mean = (3 * tl.maximum(tl.sum((key > 0).to(tl.int32), 0), 1)).to(tl.int64) << 39
    while (exponent > 1) & (mean > total):
        exponent -= 1
        mean = mean >> 1  # 39 steps are more than the largest of all leaves to take
    half = tl.where(exponent > 1, (exponent - 1) << 23, 1 << 22)
    code = tl.where(key > half, tl.where(acc < 0, -1, 1), 0)
    return exponent, code, code.to(tl.float32) * bits.as_float(exponent << 23)


@triton.jit
def _encode(  # noqa: PLR0917
    grad, e_in, e_out, payload, pid, left, records_half, decay,
    BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, VALUE_BITS: tl.constexpr,  # noqa: N803
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, DECAYED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """All phases for block ``pid``, of ``left`` elements; the pointers but payload's are the block's own."""
    at = tl.arange(0, BLOCK)
    inside = at < left
    acc = records.compensated(grad, e_in, at, inside, decay, HAS_IN, DECAYED)
    key = bits.magnitude(acc)
    chunk = tl.max(tl.reshape(key, [BLOCK // 4, 4]), 1)
    largest = tl.max(chunk, 0)
    if largest >= bits.INF:
        bits.raise_flag(payload, 0, largest)
    else:
        if HAS_OUT:
            records.store_rest(e_out, at, acc, inside)
        low = largest * 0
        if BLOCK // 4 >= K:
            low = _bound(chunk, largest, K)
        low, n = _bisect(key, low, largest + 1, _reached(key, low), K)
        first = records_half + pid.to(tl.int32) * K
        to = payload.to(tl.pointer_type(tl.int16)) + first
        _place(key, low, n, to, K)
        tl.debug_barrier()
        j = tl.arange(0, KP)
        index = tl.load(to + j, mask=j < K, other=0).to(tl.int32)
        real = (j < K) & (index < left)
        if HAS_OUT and e_out.dtype.element_ty == tl.float32:
            kept = tl.load(e_out + index, mask=real, other=0.0)
        else:
            kept = records.compensated(grad, e_in, index, real, decay, HAS_IN, DECAYED)
        if VALUE_BITS == SIGNS:
            exponent, code, value = _signed(kept, largest)
        else:
            exponent, code, value = records.coded(kept, largest, VALUE_BITS)
        tl.debug_barrier()  # all have read what is overwritten now
        if HAS_OUT:
            records.store_rest(e_out, index, kept - value, real)
        record = tl.where(real, ((code << (16 - VALUE_BITS)) | index) & 0xFFFF, 0)
        records.seal(payload, pid, first, exponent, record, j < K)


@triton.jit
def _add(  # noqa: PLR0917
    out, payloads, pid, count, stride, records_half, weight,
    BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, VALUE_BITS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Adds ``weight`` times block ``pid`` of each payload, in order, to ``out``, the block's own."""
    j = tl.arange(0, KP)
    for w in range(count):
        payload = payloads + w * tl.cast(stride, tl.int64)
        half = records_half + pid.to(tl.int32) * K + j
        record = tl.load(payload.to(tl.pointer_type(tl.int16)) + half, mask=j < K, other=0).to(tl.int32)
        real = (record != 0) | (
            j == 0
        )  # a record of zero that is not the first is padding: element 0 has its own
        scale = bits.as_float(tl.load(payload + bits.SCALES + pid).to(tl.int32) << 23)
        value = (record >> (16 - VALUE_BITS)).to(tl.float32) * scale
        place = out + (record & (BLOCK - 1))
        tl.store(place, tl.load(place, mask=real, other=0.0) + value * weight, mask=real)
        tl.debug_barrier()  # the next payload's records name the same elements to other threads


@triton.jit
def encode_kernel(  # noqa: PLR0917
    grad, e_in, e_out, payload, numel, records_half, decay,
    BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, VALUE_BITS: tl.constexpr,  # noqa: N803
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, DECAYED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """A block of a region per program."""
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK
    _encode(
        grad + start, e_in + start, e_out + start, payload, pid, bits.count_in(numel, pid, BLOCK), records_half, decay,
        BLOCK, K, KP, VALUE_BITS, HAS_IN, HAS_OUT, DECAYED,
    )  # fmt: skip


@triton.jit
def reencode_kernel(  # noqa: PLR0917
    payloads, sums, e_in, e_out, payload, count, stride, numel, records_half, weight, decay,
    BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, VALUE_BITS: tl.constexpr,  # noqa: N803
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, DECAYED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Likewise of the sum of payloads, which is formed in ``sums``; that may be ``e_out``."""
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK
    left = bits.count_in(numel, pid, BLOCK)
    flags = bits.flagged(payloads, count, stride)
    if flags != 0:
        bits.raise_flag(payload, flags, 0)
    else:
        records.fill(sums + start, 0, left, BLOCK)
        tl.debug_barrier()
        _add(sums + start, payloads, pid, count, stride, records_half, weight, BLOCK, K, KP, VALUE_BITS)
        _encode(
            sums + start, e_in + start, e_out + start, payload, pid, left, records_half, decay,
            BLOCK, K, KP, VALUE_BITS, HAS_IN, HAS_OUT, DECAYED,
        )  # fmt: skip


@triton.jit
def decode_kernel(  # noqa: PLR0917
    payloads, out, count, stride, numel, records_half, weight,
    BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, VALUE_BITS: tl.constexpr,  # noqa: N803
    CLEAR: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """``out`` (CLEAR: zero) plus all payloads, or NaN if one is flagged; a block per program."""
    pid = tl.program_id(0).to(tl.int64)
    left = bits.count_in(numel, pid, BLOCK)
    if bits.flagged(payloads, count, stride) != 0:
        records.fill(out + pid * BLOCK, bits.QUIET_NAN, left, BLOCK)
    else:
        if CLEAR:
            records.fill(out + pid * BLOCK, 0, left, BLOCK)
            tl.debug_barrier()
        _add(out + pid * BLOCK, payloads, pid, count, stride, records_half, weight, BLOCK, K, KP, VALUE_BITS)
