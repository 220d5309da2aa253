"""Into a bucket and out of it again: many tensors, one launch, each element times a factor.

A table in device memory, made once, has a row per program: where in the tensor, where in the bucket, how many elements,
of which type. Nothing is read on the host, so a launch can be captured into a CUDA graph as long as the tensors stay
where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from hybridcomm.kernels.device_tensors import GRADIENTS, check_vectors, need
from hybridcomm.kernels.triton.bucket import CHUNK, FUNCTION, WARPS
from hybridcomm.kernels.triton.function import LAUNCH

__all__ = ["Bucket", "layout", "pack", "unpack"]


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
            table=where.table, bucket=bucket, scale=scale, CHUNK=CHUNK, INTO=into, num_warps=WARPS, **LAUNCH
        )


def pack(where: Bucket, bucket: torch.Tensor, scale: float = 1.0, *, kernel: Any = FUNCTION) -> None:
    """Every tensor times ``scale`` into its place, on the device's current stream.

    bucket: (at least ``where.end``,) fp32, bf16 or fp16, contiguous, 16-byte aligned. Products are rounded to fp32,
    then to the bucket's type, half to even; what is too large becomes infinite, NaN stays. Elements between tensors
    are left as they are. ``kernel``: a `cubins.launcher.Launcher` of KERNELS runs what is shipped.

    Raises:
        ValueError: a dtype, shape, device or alignment that the kernel cannot take.
    """
    _launch(where, bucket, scale, True, kernel)


def unpack(where: Bucket, bucket: torch.Tensor, scale: float = 1.0, *, kernel: Any = FUNCTION) -> None:
    """The reverse: every tensor's place, times ``scale``, into the tensor, rounded to its type likewise."""
    _launch(where, bucket, scale, False, kernel)
