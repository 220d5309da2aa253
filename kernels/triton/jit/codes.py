"""Steps 4 and 6 of 7 on the device, for codecs with a code of fixed width per element: the oracle's bytes, as kernels.

    encode     compensates (acc = grad + decay * e_in, in registers), then writes codes, residual and checksum
    reencode   likewise of a sum of payloads, which is nowhere written
    decode     adds payloads to a region, in their order

The width says whose code it is: 1 bit `sign1`, 16 bits `casts`, else `quant`. Gradient and residual are read once.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from hybridcomm.kernels.triton.jit import bits, casts, quant, sign1

__all__ = ["decode_kernel", "encode_kernel", "reencode_kernel"]


@triton.jit
def _write(  # noqa: PLR0917
    acc, flags, e_out, payload, pid, at, count, codes,
    ELEMENTS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr,  # noqa: N803
    HAS_OUT: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    if BITS == 1:
        sign1.write(acc, flags, e_out, payload, pid, at, count, codes, ELEMENTS, GROUP, HAS_OUT, WHOLE)
    elif BITS == 16:
        casts.write(acc, flags, e_out, payload, pid, at, count, codes, ELEMENTS, MANTISSA, HAS_OUT, WHOLE)
    else:
        quant.write(
            acc, flags, e_out, payload, pid, at, count, codes,
            ELEMENTS, GROUP, BITS, MANTISSA, HAS_OUT, WHOLE,
        )  # fmt: skip


@triton.jit
def _values(  # noqa: PLR0917
    payload, pid, inside, codes, weight,
    ELEMENTS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr,  # noqa: N803
    VECTOR: tl.constexpr, FIRST: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """``weight`` times a payload's part of the tile, (rows, spans, lanes, VECTOR); FIRST: plus zero, as sums begin.

    Each thread loads the codes of just the elements it has, so that nothing is exchanged between lanes.
    """
    if BITS == 1:
        x = sign1.values(payload, pid, inside, codes, weight, ELEMENTS, GROUP, VECTOR, FIRST, WHOLE)
    elif BITS == 16:
        x = casts.values(payload, pid, inside, codes, weight, ELEMENTS, MANTISSA, VECTOR, WHOLE)
    else:
        x = quant.values(
            payload, pid, inside, codes, weight,
            ELEMENTS, GROUP, BITS, MANTISSA, VECTOR, WHOLE,
        )  # fmt: skip
    return x + 0.0 if FIRST and BITS != 1 else x


@triton.jit
def _add(  # noqa: PLR0917
    x, payloads, start, count, stride, pid, inside, codes, weight,
    ELEMENTS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr,  # noqa: N803
    VECTOR: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """x plus the payloads from number ``start`` on, in their order; and the flags of all, one at least, or-ed."""
    flags = bits.flags_of(payloads)
    for w in range(start, count):
        payload = payloads + w * tl.cast(stride, tl.int64)
        flags |= bits.flags_of(payload)
        x += _values(
            payload, pid, inside, codes, weight, ELEMENTS, GROUP, BITS, MANTISSA, VECTOR, False, WHOLE
        )
    return x, flags


@triton.jit(do_not_specialize=["first", "codes"])
def encode_kernel(  # noqa: PLR0917
    grad, e_in, e_out, payload, numel, first, codes, decay,
    ELEMENTS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr,  # noqa: N803
    VECTOR: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, DECAYED: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Programs ``first``, first + 1, ... of a region."""
    pid = tl.program_id(0).to(tl.int64) + first
    count = bits.count_in(numel, pid, ELEMENTS)
    start = pid * ELEMENTS
    at = bits.tile(ELEMENTS, VECTOR)
    paired: tl.constexpr = grad.dtype == e_in.dtype
    acc = bits.fetch(grad + start, at, count, paired, WHOLE)
    acc = bits.compensated(acc, e_in + start, decay, at, count, paired, HAS_IN, DECAYED, WHOLE)
    _write(
        acc, 0, e_out + start, payload, pid, at, count, codes,
        ELEMENTS, GROUP, BITS, MANTISSA, HAS_OUT, WHOLE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "first", "codes"])
def reencode_kernel(  # noqa: PLR0917
    payloads, e_in, e_out, payload, count, stride, numel, first, codes, weight, decay,
    ELEMENTS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr,  # noqa: N803
    VECTOR: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, DECAYED: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Likewise of the sum of payloads."""
    pid = tl.program_id(0).to(tl.int64) + first
    inside = bits.count_in(numel, pid, ELEMENTS)
    start = pid * ELEMENTS
    at = bits.tile(ELEMENTS, VECTOR)
    acc = _values(payloads, pid, inside, codes, weight, ELEMENTS, GROUP, BITS, MANTISSA, VECTOR, True, WHOLE)
    acc, flags = _add(
        acc, payloads, 1, count, stride, pid, inside, codes, weight,
        ELEMENTS, GROUP, BITS, MANTISSA, VECTOR, WHOLE,
    )  # fmt: skip
    if not WHOLE:  # what is no element may have a code or a scale, but must have no part in what is encoded
        acc = tl.where(at < inside, acc, 0.0)
    acc = bits.compensated(bits.in_fours(acc), e_in + start, decay, at, inside, True, HAS_IN, DECAYED, WHOLE)
    _write(
        acc, flags, e_out + start, payload, pid, at, inside, codes,
        ELEMENTS, GROUP, BITS, MANTISSA, HAS_OUT, WHOLE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "first", "codes"])
def decode_kernel(  # noqa: PLR0917
    payloads, out, count, stride, numel, first, codes, weight,
    ELEMENTS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr,  # noqa: N803
    WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """``out`` plus all payloads, or NaN if one is flagged."""
    pid = tl.program_id(0).to(tl.int64) + first
    inside = bits.count_in(numel, pid, ELEMENTS)
    out += pid * ELEMENTS
    at = bits.tile(ELEMENTS, 4)
    x, flags = _add(
        bits.fetch(out, at, inside, False, WHOLE), payloads, 0, count, stride, pid, inside, codes, weight,
        ELEMENTS, GROUP, BITS, MANTISSA, 4, WHOLE,
    )  # fmt: skip
    if flags != 0:
        x = bits.as_float(at * 0 + bits.QUIET_NAN)
    bits.put(out, at, x, inside, WHOLE)
