"""The second, normally empty pass of every encoder: what a non-finite shard must not send is taken back.

If the payload's flag is up, the body is cleared, the new residual becomes the old one, and the checksum is that of a
flagged payload without a body. The same for all codecs; a program strides over the region, so any grid will do.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from hybridcomm.kernels.payload import HEADER_NBYTES
from hybridcomm.kernels.triton.jit import bits

__all__ = ["withdraw_kernel"]

STEP = tl.constexpr(1024)
BODY = tl.constexpr(HEADER_NBYTES // 4)


@triton.jit(do_not_specialize=["nwords", "checksum"])
def withdraw_kernel(  # noqa: PLR0917
    e_in, e_out, payload, nwords, numel, checksum,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """``nwords``: of the body, 32 bits each; ``checksum``: of the flagged header, as int64."""
    words = payload.to(tl.pointer_type(tl.int32))
    if tl.load(words + bits.FLAGS) != 0:
        first = tl.program_id(0).to(tl.int64) * STEP
        stride = tl.num_programs(0).to(tl.int64) * STEP
        j = tl.arange(0, STEP)
        for start in range(first, nwords, stride):
            tl.store(words + BODY + start + j, j * 0, mask=start + j < nwords)
        if HAS_OUT:
            for start in range(first, numel, stride):
                inside = start + j < numel
                rest = tl.zeros([STEP], e_out.dtype.element_ty)
                if HAS_IN:
                    rest = tl.load(e_in + start + j, mask=inside)
                tl.store(e_out + start + j, rest, mask=inside)
        if first == 0:
            tl.store(payload.to(tl.pointer_type(tl.int64)) + bits.CHECKSUM, checksum)
