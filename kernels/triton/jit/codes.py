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
def _add(  # noqa: PLR0917
    x, payloads, pid, count, stride, inside, codes, weight,
    ELEMENTS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    if BITS == 1:
        x = sign1.add(x, payloads, pid, count, stride, inside, codes, weight, ELEMENTS, GROUP, WHOLE)
    elif BITS == 16:
        x = casts.add(x, payloads, pid, count, stride, inside, codes, weight, ELEMENTS, MANTISSA, WHOLE)
    else:
        x = quant.add(
            x, payloads, pid, count, stride, inside, codes, weight,
            ELEMENTS, GROUP, BITS, MANTISSA, WHOLE,
        )  # fmt: skip
    return x


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
    acc = bits.fetch(grad + start, at, count, WHOLE)
    acc = bits.compensated(acc, e_in + start, decay, at, count, HAS_IN, DECAYED, WHOLE)
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
    acc = _add(
        bits.zeros(ELEMENTS), payloads, pid, count, stride, inside, codes, weight,
        ELEMENTS, GROUP, BITS, MANTISSA, WHOLE,
    )  # fmt: skip
    if (
        BITS == 1 and not WHOLE
    ):  # what is no element has a group's scale, but must not have a part in its mean
        acc = tl.where(bits.tile(ELEMENTS, 4) < inside, acc, 0.0)
    acc = bits.compensated(acc, e_in + start, decay, at, inside, HAS_IN, DECAYED, WHOLE)
    _write(
        acc, bits.flagged(payloads, count, stride), e_out + start, payload, pid, at, inside, codes,
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
    if bits.flagged(payloads, count, stride) != 0:
        bits.put(out, at, bits.as_float(at * 0 + bits.QUIET_NAN), inside, WHOLE)
    else:
        x = _add(
            bits.fetch(out, at, inside, WHOLE), payloads, pid, count, stride, inside, codes, weight,
            ELEMENTS, GROUP, BITS, MANTISSA, WHOLE,
        )  # fmt: skip
        bits.put(out, at, x, inside, WHOLE)
