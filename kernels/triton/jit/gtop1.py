"""Steps 4 and 6 of 7 on the device: gtop1, the oracle's bytes, as Triton kernels.

A program, one warp, takes a block of ROWS x K elements, TILE rows at a time. Phases of encode
    1  compensate   acc = grad + decay * e_in, written to e_out as it is
    2  select       each slot of the tile keeps its largest so far, then each column the largest of its slots, ties to
                    the lowest row; a non-finite value raises the payload's flag
    3  quantise     power-of-two scale; rounding by adding 1.5 * 2^23
    4  write        the K residuals that differ, scale, records; the block's share of the checksum

A column belongs to one thread, whatever the row, so payloads are added one after another without a barrier.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-unimported"

from __future__ import annotations

import triton
import triton.language as tl

from hybridcomm.kernels.triton.jit import bits, records

__all__ = ["decode_kernel", "encode_kernel", "reencode_kernel"]


@triton.jit
def _select(  # noqa: PLR0917
    grad, e_in, e_out, count, decay,
    ROWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr,  # noqa: N803
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, DECAYED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Phases 1 and 2: per column the bits of its largest magnitude, its row and its value, (KP,) each.

    What stands from ``count`` on is zero; every column begins in row 0 of the first tile, as TILE <= ROWS.
    """
    row = tl.arange(0, TILE)[:, None]
    column = tl.arange(0, KP)[None, :]
    best = (
        row + column * 0 - TILE
    )  # negative: a slot's first element is taken even when it is zero, for its sign
    value = bits.as_float(best * 0)
    of = best * 0
    for first in range(0, ROWS, TILE):
        at = (first + row) * K + column
        inside = at < count
        acc = records.compensated(grad, e_in, at, inside, decay, HAS_IN, DECAYED)
        key = bits.magnitude(acc)
        larger = key > best
        best = tl.where(larger, key, best)
        value = tl.where(larger, acc, value)
        of = tl.where(larger, first + row, of)
        if HAS_OUT:
            records.store_rest(e_out, at, acc, inside)
    top = tl.max(best, 0)
    lowest = tl.min(tl.where(best == top[None, :], of, ROWS), 0)
    chosen = (best == top[None, :]) & (of == lowest[None, :])  # one slot of each column
    return top, lowest, bits.as_float(tl.sum(tl.where(chosen, bits.as_bits(value), 0), 0))


@triton.jit
def _encode(  # noqa: PLR0917
    grad, e_in, e_out, payload, pid, left, records_half, decay,
    ROWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, VALUE_BITS: tl.constexpr,  # noqa: N803
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, DECAYED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """All phases for block ``pid``, of ``left`` elements; the pointers but payload's are the block's own."""
    j = tl.arange(0, KP)
    real = j < K
    count = left if KP == K else tl.where(real, left, 0)[None, :]
    top, row, acc = _select(grad, e_in, e_out, count, decay, ROWS, K, KP, TILE, HAS_IN, HAS_OUT, DECAYED)
    largest = tl.max(top, 0)
    bits.raise_flag(payload, 0, largest)
    exponent, code, value = records.coded(acc, largest, VALUE_BITS)
    if HAS_OUT:
        tl.debug_barrier()  # behind what other threads wrote in phase 1
        place = row * K + j
        records.store_rest(e_out, place, acc - value, real & (place < left))
    record = ((code << (16 - VALUE_BITS)) | row) & 0xFFFF
    records.seal(payload, pid, records_half + pid.to(tl.int32) * K, exponent, record, real)


@triton.jit
def _add(  # noqa: PLR0917
    out, payloads, pid, count, stride, left, records_half, weight,
    K: tl.constexpr, KP: tl.constexpr, VALUE_BITS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Adds ``weight`` times block ``pid`` of each payload, in order, to ``out``, the block's own."""
    j = tl.arange(0, KP)
    for w in range(count):
        payload = payloads + w * tl.cast(stride, tl.int64)
        half = records_half + pid.to(tl.int32) * K + j
        record = tl.load(payload.to(tl.pointer_type(tl.int16)) + half, mask=j < K, other=0).to(tl.int32)
        place = (record & ((1 << (16 - VALUE_BITS)) - 1)) * K + j
        inside = (j < K) & (place < left)  # a column beyond the region names its first row
        scale = bits.as_float(tl.load(payload + bits.SCALES + pid).to(tl.int32) << 23)
        value = (record >> (16 - VALUE_BITS)).to(tl.float32) * scale
        tl.store(out + place, tl.load(out + place, mask=inside, other=0.0) + value * weight, mask=inside)


@triton.jit
def encode_kernel(  # noqa: PLR0917
    grad, e_in, e_out, payload, numel, records_half, decay,
    ROWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, VALUE_BITS: tl.constexpr,  # noqa: N803
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, DECAYED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """A block of a region per program."""
    size: tl.constexpr = ROWS * K
    pid = tl.program_id(0).to(tl.int64)
    start = pid * size
    _encode(
        grad + start, e_in + start, e_out + start, payload, pid, bits.count_in(numel, pid, size), records_half, decay,
        ROWS, K, KP, TILE, VALUE_BITS, HAS_IN, HAS_OUT, DECAYED,
    )  # fmt: skip


@triton.jit
def reencode_kernel(  # noqa: PLR0917
    payloads, sums, e_in, e_out, payload, count, stride, numel, records_half, weight, decay,
    ROWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, VALUE_BITS: tl.constexpr,  # noqa: N803
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
        _add(sums + start, payloads, pid, count, stride, left, records_half, weight, K, KP, VALUE_BITS)
        tl.debug_barrier()
        _encode(
            sums + start, e_in + start, e_out + start, payload, pid, left, records_half, decay,
            ROWS, K, KP, TILE, VALUE_BITS, HAS_IN, HAS_OUT, DECAYED,
        )  # fmt: skip


@triton.jit
def decode_kernel(  # noqa: PLR0917
    payloads, out, count, stride, numel, records_half, weight,
    ROWS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, VALUE_BITS: tl.constexpr,  # noqa: N803
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
        _add(out + pid * size, payloads, pid, count, stride, left, records_half, weight, K, KP, VALUE_BITS)
