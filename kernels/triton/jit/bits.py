"""What the device kernels share: fp32 as bits, the tile that a program holds, and a payload's checksum.

A program takes a tile of spans of 256 neighbouring elements, 8 rows of 8 vectors of 4: tensors of shape (rows, spans,
lanes, 4). A thread loads and stores 128 bits, four elements of 32 bits or eight of 16, and has the same place in all
rows of a span: neighbouring threads read neighbouring memory, codes are packed within a thread, and the largest of a
group is found with few shuffles. Nothing but speed depends on where the compiler puts an element.

Every function here is exact, or rounds as its text says, in Triton's interpreter and on every device alike.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import os

import triton
import triton.language as tl

from hybridcomm.kernels.payload import HEADER_NBYTES

__all__ = [
    "CHECKSUM",
    "FLAGS",
    "INF",
    "QUIET_NAN",
    "SCALES",
    "add_checksum",
    "as_bits",
    "as_float",
    "byte_share",
    "compensated",
    "count_in",
    "fetch",
    "flagged",
    "flags_of",
    "four",
    "groups",
    "half_share",
    "in_fours",
    "largest_of_four",
    "magnitude",
    "narrowed",
    "packed_bytes",
    "pairs_to_bf16",
    "put",
    "raise_flag",
    "spread",
    "store_rest",
    "tile",
    "to_bf16",
    "vectors",
    "with_first",
    "word_share",
    "words",
]

SPAN = tl.constexpr(256)
ROWS = tl.constexpr(8)
LANES = tl.constexpr(8)
ROW = tl.constexpr(32)

SCALES = tl.constexpr(HEADER_NBYTES)  # byte offset of the scales
FLAGS = tl.constexpr(10)  # the header's fields, counted in their own type
CHECKSUM = tl.constexpr(6)

INTERPRETED = tl.constexpr(
    os.environ.get("TRITON_INTERPRET") == "1"
)  # its conversions to bf16 cut digits off

INF = tl.constexpr(0x7F800000)
BF16_LARGEST = tl.constexpr(0x7F7F0000)
BF16_MAX = tl.constexpr(float.fromhex("0x1.fep127"))  # the same as a number
QUIET_NAN = tl.constexpr(0x7FC00000)

_BOUNDED = tl.constexpr(
    """{
    .reg .b32 %both, %bound;
    cvt.rn.bf16x2.f32 %both, $2, $1;
    mov.b32 %bound, 0x7F7F7F7F;
    min.bf16x2 %both, %both, %bound;
    mov.b32 %bound, 0xFF7FFF7F;
    max.bf16x2 $0, %both, %bound;
    }"""
)


@triton.jit
def as_bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x):
    """Magnitudes as integers: they order like |x|, NaN above infinity."""
    return as_bits(x) & 0x7FFFFFFF


@triton.jit
def four(x):
    """The elements of each vector one by one, (rows, spans, lanes) each."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def largest_of_four(x):
    """Each vector's largest magnitude as an integer, (rows, spans, lanes); of a NaN it is above infinity."""
    a, b, c, d = four(tl.abs(x))
    ab = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    cd = tl.maximum(c, d, propagate_nan=tl.PropagateNan.ALL)
    return as_bits(tl.maximum(ab, cd, propagate_nan=tl.PropagateNan.ALL)) & 0x7FFFFFFF


@triton.jit
def narrowed(x):
    """fp32 to the bits of bf16, still at the top of 32: half to even, nothing finite becomes infinite."""
    bits = as_bits(x)
    size = bits & 0x7FFFFFFF
    size = (size + 0x7FFF + ((size >> 16) & 1)) & -65536
    return tl.minimum(size, BF16_LARGEST) | (bits & -0x80000000)


@triton.jit
def to_bf16(x):
    """fp32 to bf16, half to even; what is too large takes the largest."""
    if INTERPRETED:
        y = (narrowed(x) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        largest: tl.constexpr = BF16_MAX
        y = tl.minimum(tl.maximum(x, -largest), largest).to(tl.bfloat16)
    return y


@triton.jit
def pairs_to_bf16(x):
    """Likewise, where each thread has pairs: two operations bound both of a pair, where `to_bf16` takes four."""
    if INTERPRETED:
        y = to_bf16(x)
    else:
        y = tl.inline_asm_elementwise(_BOUNDED, "=r,r,r", [x], tl.bfloat16, is_pure=True, pack=2)
    return y


@triton.jit
def vectors(ELEMENTS: tl.constexpr, VECTOR: tl.constexpr, UNIT: tl.constexpr = 1):  # noqa: N803
    """Places of a program's vectors, (rows, spans, lanes, 1), in UNIT elements, which divide a row. VECTOR is 4, or 8
    where a type has 16 bits."""
    lanes: tl.constexpr = ROW // VECTOR
    row = tl.arange(0, ROWS)[:, None, None, None] * (ROW // UNIT)
    span = tl.arange(0, ELEMENTS // SPAN)[None, :, None, None] * (SPAN // UNIT)
    return span + (row + tl.arange(0, lanes)[None, None, :, None] * VECTOR // UNIT)


@triton.jit
def tile(ELEMENTS: tl.constexpr, VECTOR: tl.constexpr):  # noqa: N803
    """Places of a program's elements, (rows, spans, lanes, VECTOR)."""
    return vectors(ELEMENTS, VECTOR) + tl.arange(0, VECTOR)[None, None, None, :]


@triton.jit
def in_fours(x):
    """What is one tile's, as (rows, spans, lanes, 4), wherever vectors end."""
    return tl.reshape(x, [ROWS, x.shape[1], LANES, 4])


@triton.jit
def words(ELEMENTS: tl.constexpr):  # noqa: N803
    """Places of what a vector of elements is packed into, (rows, spans, lanes)."""
    row = tl.arange(0, ROWS)[:, None, None] * LANES
    span = tl.arange(0, ELEMENTS // SPAN)[None, :, None] * (ROWS * LANES)
    return span + row + tl.arange(0, LANES)[None, None, :]


@triton.jit
def groups(x, COUNT: tl.constexpr):  # noqa: N803
    """From (rows, spans, lanes) to (COUNT, what a group has of them)."""
    each: tl.constexpr = x.numel // COUNT
    return tl.reshape(tl.trans(x, 1, 0, 2), [COUNT, each])


@triton.jit
def spread(x, ELEMENTS: tl.constexpr):  # noqa: N803
    """From a value per group, (groups,), to (rows, spans, lanes, 1)."""
    spans: tl.constexpr = ELEMENTS // SPAN
    count: tl.constexpr = x.shape[0]
    each: tl.constexpr = spans * ROWS * LANES // count
    wide = tl.reshape(tl.broadcast_to(x[:, None], [count, each]), [spans, ROWS, LANES])
    return tl.trans(wide, 1, 0, 2)[:, :, :, None]


@triton.jit
def count_in(numel, pid, ELEMENTS: tl.constexpr):  # noqa: N803
    """How many of program ``pid``'s elements the region has, at most ELEMENTS."""
    left = numel - pid * ELEMENTS
    return tl.where(left < ELEMENTS, left, ELEMENTS).to(tl.int32)  # unlike a minimum, keeps what 16 divides


@triton.jit
def fetch(base, at, count, PAIRED: tl.constexpr, WHOLE: tl.constexpr):  # noqa: N803
    """fp32 (rows, spans, lanes, 4) of what stands at ``base + at``; zero from ``count`` on, where not WHOLE.

    PAIRED: whole tiles of bf16 are widened from words of two, where taking a half out costs an instruction more; a
    kernel that also loads fp32 would then give the two to different threads.
    """
    if PAIRED and WHOLE and base.dtype.element_ty == tl.bfloat16:
        each: tl.constexpr = at.shape[3] // 2
        pairs = vectors(at.numel, at.shape[3], 2) + tl.arange(0, each)[None, None, None, :]
        pair = tl.load(base.to(tl.pointer_type(tl.int32)) + pairs)
        x = as_float(tl.reshape(tl.join(pair << 16, pair & -65536), at.shape))
    else:
        x = tl.load(base + at) if WHOLE else tl.load(base + at, mask=at < count, other=0.0)
    return in_fours(x.to(tl.float32))


@triton.jit
def put(base, at, x, count, WHOLE: tl.constexpr):  # noqa: N803
    """The reverse, in the type of ``x``."""
    x = tl.reshape(x, at.shape)
    if WHOLE:
        tl.store(base + at, x)
    else:
        tl.store(base + at, x, mask=at < count)


@triton.jit
def compensated(  # noqa: PLR0917
    x, e_in, decay, at, count,
    PAIRED: tl.constexpr, HAS_IN: tl.constexpr, DECAYED: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """``x + decay * e_in``, each operation rounded; x is fp32 already."""
    if HAS_IN:
        e = fetch(e_in, at, count, PAIRED, WHOLE)
        x = x + (e * decay if DECAYED else e)
    return x


@triton.jit
def store_rest(base, at, rest, count, SMALL: tl.constexpr, WHOLE: tl.constexpr):  # noqa: N803
    """A residual in its own type, fp32 or bf16. SMALL: what is finite is below 2^127, so no bf16 is infinite."""
    if base.dtype.element_ty == tl.bfloat16:
        rest = rest.to(tl.bfloat16) if SMALL and not INTERPRETED else pairs_to_bf16(rest)
    put(base, at, rest, count, WHOLE)


@triton.jit
def raise_flag(payload, flags, largest):
    """NONFINITE in the header if ``flags`` has it or ``largest``, a magnitude's bits, is that of no number."""
    head = payload.to(tl.pointer_type(tl.int32))
    tl.atomic_or(head + FLAGS, 1, mask=(largest >= INF) | (flags != 0), sem="relaxed")


@triton.jit
def flags_of(payload):
    return tl.load(payload.to(tl.pointer_type(tl.int32)) + FLAGS)


@triton.jit
def flagged(payloads, count, stride):
    """The flags of ``count`` payloads or-ed."""
    flags = 0
    for w in range(count):
        flags |= flags_of(payloads + w * tl.cast(stride, tl.int64))
    return flags


@triton.jit
def _weighted(word, factor):
    """A word times an odd factor; both are 32 bits without a sign, the product has 64."""
    return word.to(tl.uint32, bitcast=True).to(tl.uint64) * factor.to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def word_share(word, at):
    """What an int32 adds to the checksum when it is word number ``at`` of the payload; the factor wraps at 2^32."""
    return _weighted(word, at * 2 + 1)


@triton.jit
def half_share(half, at):
    """Likewise 16 bits, the higher ones of ``half`` being zero, as half word number ``at``."""
    return _weighted(half << ((at & 1) * 16), at | 1)


@triton.jit
def byte_share(byte, at):
    """Likewise 8 bits as byte number ``at``."""
    return _weighted(byte << ((at & 3) * 8), (at >> 2) * 2 + 1)


@triton.jit
def packed_bytes(x, WIDTH: tl.constexpr):  # noqa: N803
    """Neighbouring bytes, an int32 each, as numbers of WIDTH (1, 2 or 4) bytes, the first lowest."""
    if WIDTH == 4:
        even, odd = tl.split(tl.reshape(x, [x.numel // 4, 2, 2]))
        low, high = tl.split(even | (odd << 8))
        x = low | (high << 16)
    elif WIDTH == 2:
        low, high = tl.split(tl.reshape(x, [x.numel // 2, 2]))
        x = low | (high << 8)
    return x


@triton.jit
def _sum32(x):
    return tl.sum(x.to(tl.int32), 0)


@triton.jit
def add_checksum(payload, x, more):
    """Adds all of ``x`` (spans, lanes), uint64, and ``more`` to the header's checksum, with one atomic operation.

    Summed across lanes in pieces of 22 bits: one instruction each, where 64 bits take five rounds of shuffles. A piece
    of 512 lanes is below 2^31; what there are more is added up before, within threads.
    """
    x = tl.reshape(x, [x.numel])
    if x.numel > 512:
        x = tl.sum(tl.reshape(x, [x.numel // 512, 512]), 0)
    total = _sum32(x & 0x3FFFFF).to(tl.int64) + more
    total += _sum32((x >> 22) & 0x3FFFFF).to(tl.int64) << 22
    total += _sum32(x >> 44).to(tl.int64) << 44
    tl.atomic_add(payload.to(tl.pointer_type(tl.int64)) + CHECKSUM, total, sem="relaxed")


@triton.jit
def with_first(x, more):
    """``x`` (spans, lanes) plus ``more``, a number of shares that are added to the first lanes of spans."""
    rows: tl.constexpr = min(more.numel, x.shape[0])
    each: tl.constexpr = x.numel // rows
    more = tl.sum(tl.reshape(more, [rows, more.numel // rows]), 1)
    first = tl.arange(0, each)[None, :] == 0
    return tl.reshape(tl.reshape(x, [rows, each]) + tl.where(first, more[:, None], 0), x.shape)
