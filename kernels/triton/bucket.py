"""Into a bucket and out of it again: many tensors, one launch, each element times a factor.

A table in device memory, made once, has a row per program: where in the tensor, where in the bucket, how many elements,
of which type. Nothing is read on the host, so a launch can be captured into a CUDA graph as long as the tensors stay
where they are.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl

from hybridcomm.kernels.device import Argument, Budget, DeviceKernel
from hybridcomm.kernels.device_tensors import GRADIENTS, check_vectors, need
from hybridcomm.kernels.triton import bits
from hybridcomm.kernels.triton.launch import LAUNCH

__all__ = ["CHUNK", "KERNELS", "Bucket", "layout", "pack", "unpack"]

CHUNK = 4096
"""Elements per program."""

WARPS = 4
ROW = tl.constexpr(4)  # address, place in the bucket, count, kind
WHOLE_KINDS = tl.constexpr(
    3
)  # kinds are places in GRADIENTS; from here on of whole chunks that begin on 16 bytes
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


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Which tensors lie where in a bucket. ``table``: (programs, 4) int64 on the device; ``end``: behind the last.

    The tensors are held, for the table has their addresses.
    """

    tensors: tuple[torch.Tensor, ...]
    table: torch.Tensor
    end: int


def _rows(tensor: torch.Tensor, offset: int) -> list[tuple[int, int, int, int]]:
    size, kind = tensor.element_size(), GRADIENTS.index(tensor.dtype)
    rows = []
    for start in range(0, tensor.numel(), CHUNK):
        address, place = tensor.data_ptr() + start * size, offset + start
        count = min(CHUNK, tensor.numel() - start)
        whole = count == CHUNK and address % 16 == 0 and place % 8 == 0
        rows.append((address, place, count, kind + 3 * whole))
    return rows


def layout(tensors: Sequence[torch.Tensor], offsets: Sequence[int]) -> Bucket:
    """Tensor i from element ``offsets[i]`` of the bucket on; offsets ascend. Copies the table to the device.

    Tensors are contiguous, fp32, bf16 or fp16, on one device. Offsets that are multiples of 8 make accesses wide.

    Raises:
        ValueError: no tensors, a type or layout that is not so, or tensors that overlap in the bucket.
    """
    need(len(tensors) == len(offsets) > 0, "bucket: as many offsets as tensors wanted, and at least one")
    for i, tensor in enumerate(tensors):
        need(
            tensor.dtype in GRADIENTS, f"tensor {i}: float32, bfloat16 or float16 wanted, got {tensor.dtype}"
        )
        need(tensor.is_contiguous(), f"tensor {i}: a contiguous one wanted")
        need(tensor.device == tensors[0].device, f"tensor {i}: on {tensor.device}, others elsewhere")
    ends = [offset + tensor.numel() for tensor, offset in zip(tensors, offsets, strict=True)]
    apart = all(end <= offset for end, (_, offset) in zip(ends, pairwise(offsets), strict=False))
    need(apart and offsets[0] >= 0, "bucket: ascending offsets wanted, each behind the tensor before")
    rows = [row for tensor, offset in zip(tensors, offsets, strict=True) for row in _rows(tensor, offset)]
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).to(tensors[0].device)
    return Bucket(tensors=tuple(tensors), table=table, end=ends[-1])


def _launch(where: Bucket, bucket: torch.Tensor, scale: float, into: bool, kernel: Any) -> None:
    check_vectors(bucket.numel(), where.table.device, GRADIENTS, bucket=bucket)
    need(bucket.numel() >= where.end, f"bucket: {where.end} elements wanted, got {bucket.numel()}")
    if where.table.shape[0]:
        kernel[(where.table.shape[0],)](
            where.table, bucket, scale, CHUNK=CHUNK, INTO=into, num_warps=WARPS, **LAUNCH
        )


def pack(where: Bucket, bucket: torch.Tensor, scale: float = 1.0, *, kernel: Any = bucket_kernel) -> None:
    """Every tensor times ``scale`` into its place, on the device's current stream.

    bucket: (at least ``where.end``,) fp32, bf16 or fp16, contiguous, 16-byte aligned. Products are rounded to fp32,
    then to the bucket's type, half to even; what is too large becomes infinite, NaN stays. Elements between tensors
    are left as they are. ``kernel``: a `cubins.launcher.Launcher` of KERNELS runs what is shipped.

    Raises:
        ValueError: a dtype, shape, device or alignment that the kernel cannot take.
    """
    _launch(where, bucket, scale, True, kernel)


def unpack(where: Bucket, bucket: torch.Tensor, scale: float = 1.0, *, kernel: Any = bucket_kernel) -> None:
    """The reverse: every tensor's place, times ``scale``, into the tensor, rounded to its type likewise."""
    _launch(where, bucket, scale, False, kernel)


def _shipped(into: bool, name: str) -> DeviceKernel:
    """Budgets are for tensors of fp32; ``cold`` has the code of all six cases, of which a program runs one."""
    size = 4 if name == "fp32" else 2
    return DeviceKernel(
        name=f"bucket_{'pack' if into else 'unpack'}_{name}",
        source="triton/bucket.py",
        function="bucket_kernel",
        arguments=(
            Argument(name="table", type="*i64"),
            Argument(name="bucket", type=f"*{name}"),
            Argument(name="scale", type="fp32", aligned=False),
        ),
        constants=(("CHUNK", CHUNK), ("INTO", int(into))),
        num_warps=WARPS,
        elements=CHUNK,
        budget=Budget(nbytes=1.02 * (4 + size), instructions=20, cold=120, registers=128),
    )


KERNELS = tuple(_shipped(into, name) for into in (True, False) for name in ("fp32", "bf16", "fp16"))
