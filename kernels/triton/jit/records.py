"""What topk, gtop1 and randk share on the device: a payload of one scale and k values per block.

A program takes a block, of any size: regions that end inside a block are masked, which costs no bulk access as long as
their size is a multiple of 16. Reencoding forms the sum where the new residual will be, a block of it in a program's
cache; where that is bf16, in a buffer of its own.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-unimported"

from __future__ import annotations

import triton
import triton.language as tl

from hybridcomm.kernels.triton.jit import bits

__all__ = ["coded", "compensated", "fill", "seal", "store_rest"]

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 half to even
STEP = tl.constexpr(512)


@triton.jit
def _widened(x):
    """To fp32; of bf16 by its bits, as Triton's interpreter does not know its denormals."""
    if x.dtype == tl.bfloat16:
        x = bits.as_float(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return x.to(tl.float32)


@triton.jit
def compensated(  # noqa: PLR0917
    grad, e_in, at, inside, decay, HAS_IN: tl.constexpr, DECAYED: tl.constexpr  # noqa: N803
):  # fmt: skip
    """``grad + decay * e_in`` at ``at``, fp32, each operation rounded; zero where not ``inside``."""
    acc = _widened(tl.load(grad + at, mask=inside, other=0.0))
    if HAS_IN:
        e = _widened(tl.load(e_in + at, mask=inside, other=0.0))
        acc = acc + (e * decay if DECAYED else e)
    return acc


@triton.jit
def store_rest(e_out, at, rest, inside):
    """A residual in its own type, fp32 or bf16."""
    if e_out.dtype.element_ty == tl.bfloat16:
        rest = bits.to_bf16(rest)
    tl.store(e_out + at, rest, mask=inside)


@triton.jit
def coded(acc, largest, VALUE_BITS: tl.constexpr):  # noqa: N803
    """The scale's exponent for a block whose largest magnitude has these bits; codes, as int32; values."""
    exponent = tl.maximum((largest >> 23) + 2 - VALUE_BITS, 1)
    q_max: tl.constexpr = (1 << (VALUE_BITS - 1)) - 1
    code = (acc * bits.as_float((254 - exponent) << 23) + ROUND) - ROUND
    code = tl.minimum(tl.maximum(code, -q_max), q_max)
    return exponent, code.to(tl.int32), code * bits.as_float(exponent << 23)


@triton.jit
def seal(payload, pid, first, exponent, record, real):
    """Writes a block's records, from half word ``first`` of the payload on, and scale; adds them to the checksum."""
    half = first + tl.arange(0, record.shape[0])
    tl.store(payload.to(tl.pointer_type(tl.int16)) + half, record.to(tl.int16), mask=real)
    tl.store(payload + bits.SCALES + pid, exponent.to(tl.uint8))
    share = bits.byte_share(exponent, pid.to(tl.int32) + bits.SCALES)
    bits.add_checksum(payload, tl.where(real, bits.half_share(record, half), 0), share.to(tl.int64))


@triton.jit
def fill(out, word, left, SIZE: tl.constexpr):  # noqa: N803
    """The first ``left`` of SIZE elements become the float whose bits are ``word``."""
    for first in range(0, SIZE, STEP):
        at = first + tl.arange(0, STEP)
        tl.store(out + at, bits.as_float(at * 0 + word), mask=at < left)
