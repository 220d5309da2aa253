"""Into a bucket and out of it again: many tensors, one launch, each element times a factor.

A table has a row per program: where in the tensor, where in the bucket, how many elements, of which type.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from hybridcomm.kernels.triton.jit import bits

__all__ = ["bucket_kernel"]

ROW = tl.constexpr(4)  # address, place in the bucket, count, kind
WHOLE_KINDS = tl.constexpr(3)  # kinds: fp32, bf16, fp16; from here on of whole chunks that begin on 16 bytes
NAN16 = tl.constexpr(0x7E00)


@triton.jit
def _bf16(x):
    """Half to even as everywhere, but infinity where fp32 has more, and NaN stays NaN: the bits of bf16."""
    word = bits.as_bits(x)
    size = word & 0x7FFFFFFF
    rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    return tl.where(size > bits.INF, (word >> 16) | 0x40, rounded)


@triton.jit
def _fp16(x):
    """Likewise the bits of fp16."""
    size = tl.minimum(tl.abs(x), 65536.0)  # infinity's place, were there one code more
    exponent = tl.maximum(bits.as_bits(size), (127 - 14) << 23) & bits.INF
    step = bits.as_float(exponent + (13 << 23))
    code = bits.as_bits(((size + step) - step) * 2.0**-112) >> 13
    code = tl.where(bits.magnitude(x) > bits.INF, NAN16, code)
    return code | ((bits.as_bits(x) >> 16) & 0x8000)


@triton.jit
def _move(source, target, count, scale, CHUNK: tl.constexpr, WHOLE: tl.constexpr):  # noqa: N803
    """``target = source * scale``, the product rounded to fp32 and then to the target's type."""
    j = tl.arange(0, CHUNK)
    if WHOLE:
        x = tl.load(source + j).to(tl.float32) * scale
    else:
        x = tl.load(source + j, mask=j < count, other=0.0).to(tl.float32) * scale
    if target.dtype.element_ty == tl.bfloat16:
        x = _bf16(x).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif target.dtype.element_ty == tl.float16:
        x = _fp16(x).to(tl.int16).to(tl.float16, bitcast=True)
    if WHOLE:
        tl.store(target + j, x)
    else:
        tl.store(target + j, x, mask=j < count)


@triton.jit
def _either(  # noqa: PLR0917
    address, bucket, start, count, scale, TYPE: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, INTO: tl.constexpr,  # noqa: N803
):  # fmt: skip
    # Both begin on 16 bytes where the chunk is WHOLE; the compiler takes the word of what computes a pointer.
    aligned: tl.constexpr = 16 if WHOLE else 1
    tensor = tl.multiple_of(address.to(tl.pointer_type(TYPE)), aligned)
    place = tl.multiple_of(bucket + start, aligned)
    if INTO:
        _move(tensor, place, count, scale, CHUNK, WHOLE)
    else:
        _move(place, tensor, count, scale, CHUNK, WHOLE)


@triton.jit
def bucket_kernel(table, bucket, scale, CHUNK: tl.constexpr, INTO: tl.constexpr):  # noqa: N803
    """A chunk of one tensor INTO the bucket, or out of it."""
    row = table + tl.program_id(0) * ROW
    address, start, count, kind = (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2).to(tl.int32),
        tl.load(row + 3),
    )
    if kind == WHOLE_KINDS:
        _either(address, bucket, start, count, scale, tl.float32, CHUNK, True, INTO)
    elif kind == WHOLE_KINDS + 1:
        _either(address, bucket, start, count, scale, tl.bfloat16, CHUNK, True, INTO)
    elif kind == WHOLE_KINDS + 2:
        _either(address, bucket, start, count, scale, tl.float16, CHUNK, True, INTO)
    elif kind == 0:
        _either(address, bucket, start, count, scale, tl.float32, CHUNK, False, INTO)
    elif kind == 1:
        _either(address, bucket, start, count, scale, tl.bfloat16, CHUNK, False, INTO)
    else:
        _either(address, bucket, start, count, scale, tl.float16, CHUNK, False, INTO)
