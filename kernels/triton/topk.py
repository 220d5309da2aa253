"""Steps 4 and 6 of 7 on the device: compress and decompress, the oracle's bytes, as Triton kernels (fp32).

One program per block. Phases of encode
    1  compensate   acc = grad + e_in in registers; a non-finite value raises the payload's flag
    2  select       gallop down from the largest magnitude, then bisect to the k-th; ties to the lowest index
    3  quantise     power-of-two scale; rounding by adding 1.5 * 2^23
    4  write        residual, scale, records; the block's share of the checksum by one atomic addition
    5  withdraw     a second, normally empty pass: if the flag is up, clear the body and restore the residual

Checked without a GPU in Triton's interpreter (TRITON_INTERPRET=1) against ``kernels/reference.py``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from hybridcomm.kernels import reference
from hybridcomm.kernels.spec import (
    FLAG_NONFINITE,
    HEADER_DTYPE,
    HEADER_NBYTES,
    PayloadFormatError,
    Status,
    TopKSpec,
)

__all__ = ["decode_add", "encode"]

SCALES = tl.constexpr(HEADER_NBYTES)  # byte offset of the scales
FLAGS_I32 = tl.constexpr(10)  # the header's fields, counted in their own type
CHECKSUM_I64 = tl.constexpr(6)
LAUNCH = {
    "num_warps": 4,
    "enable_fp_fusion": False,
}  # a fused multiply-add would round once, the oracle rounds twice
FLAGS_FACTOR = 2 * 10 + 1  # what the flags word is multiplied with in the checksum


@triton.jit
def _power(exponent):
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _weighted(value, byte):
    """A value's share of the checksum when it stands at ``byte`` of the payload (both int64)."""
    return (value << ((byte & 3) * 8)) * (((byte >> 2) * 2 + 1) & 0xFFFFFFFF)


@triton.jit
def _kth_largest(key, K: tl.constexpr):  # noqa: N803
    """A threshold with exactly K keys at or above it, or the K-th largest key where ties forbid that."""
    hi = tl.max(key, 0) + 1
    step = hi * 0 + (1 << 22)
    lo = tl.maximum(hi - step, 0)
    n = tl.sum((key >= lo).to(tl.int32), 0)
    while n < K:
        hi = lo
        step = step * 2
        lo = tl.maximum(hi - step, 0)
        n = tl.sum((key >= lo).to(tl.int32), 0)
    while (n != K) & (hi - lo > 1):
        mid = lo + ((hi - lo) >> 1)
        c = tl.sum((key >= mid).to(tl.int32), 0)
        lo = tl.where(c >= K, mid, lo)
        n = tl.where(c >= K, c, n)
        hi = tl.where(c >= K, hi, mid)
    return lo


@triton.jit
def _encode(  # noqa: PLR0917
    grad, e_in, e_out, payload, payload_i16, payload_i32, payload_i64, numel, records_offset,
    BLOCK: tl.constexpr, K: tl.constexpr, VALUE_BITS: tl.constexpr,  # noqa: N803
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr,  # noqa: N803
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    at = pid * BLOCK + offs
    inside = at < numel
    acc = tl.load(grad + at, mask=inside, other=0.0)
    if HAS_IN:
        acc = acc + tl.load(e_in + at, mask=inside, other=0.0)
    key = acc.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(key, 0)
    if largest >= 0x7F800000:
        tl.atomic_or(payload_i32 + FLAGS_I32, 1)
    else:
        t = _kth_largest(key, K)
        above = (key > t).to(tl.int32)
        equal = (key == t).to(tl.int32)
        both = (above << 16) | equal
        before = tl.cumsum(both, 0) - both
        need = K - tl.sum(above, 0)
        keep = (above == 1) | ((equal == 1) & ((before & 0xFFFF) < need))
        position = (before >> 16) + tl.minimum(before & 0xFFFF, need)
        exponent = tl.maximum((largest >> 23) + 2 - VALUE_BITS, 1)
        q_max: tl.constexpr = (1 << (VALUE_BITS - 1)) - 1
        # Clamped before the conversion, where what is not kept cannot overflow either.
        rounded = (acc * _power(254 - exponent) + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(rounded, -q_max), q_max).to(tl.int32)
        if HAS_OUT:
            rest = tl.where(keep, acc - code.to(tl.float32) * _power(exponent), acc)
            tl.store(e_out + at, rest, mask=inside)
        record = ((code << (16 - VALUE_BITS)) | offs) & 0xFFFF
        record = tl.where(inside, record, 0)
        byte = records_offset + 2 * (pid * K + position.to(tl.int64))
        tl.store(payload_i16 + (byte >> 1), record.to(tl.int16), mask=keep)
        tl.store(payload + SCALES + pid, exponent.to(tl.uint8))
        share = tl.sum(tl.where(keep, _weighted(record.to(tl.int64), byte), 0), 0)
        share += _weighted(exponent.to(tl.int64), SCALES + pid)
        tl.atomic_add(payload_i64 + CHECKSUM_I64, share)


@triton.jit
def _withdraw(  # noqa: PLR0917
    e_in, e_out, payload, payload_i16, payload_i32, payload_i64, numel, records_offset, checksum,
    BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,  # noqa: N803
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr,  # noqa: N803
):  # fmt: skip
    if tl.load(payload_i32 + FLAGS_I32) != 0:
        pid = tl.program_id(0).to(tl.int64)
        j = tl.arange(0, KP)
        tl.store(payload_i16 + (records_offset >> 1) + pid * K + j, tl.zeros((KP,), tl.int16), mask=j < K)
        tl.store(payload + SCALES + pid, pid.to(tl.uint8) * 0)
        if HAS_OUT:
            at = pid * BLOCK + tl.arange(0, BLOCK)
            inside = at < numel
            rest = tl.zeros((BLOCK,), tl.float32)
            if HAS_IN:
                rest = tl.load(e_in + at, mask=inside, other=0.0)
            tl.store(e_out + at, rest, mask=inside)
        if pid == 0:
            tl.store(payload_i64 + CHECKSUM_I64, checksum)


@triton.jit
def _decode_add(  # noqa: PLR0917
    payloads, payloads_i16, payloads_i32, out, count, stride, numel, records_offset, weight,
    BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, VALUE_BITS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    flagged = 0
    for w in range(count):
        flagged |= tl.load(payloads_i32 + w * (stride >> 2) + FLAGS_I32)
    if flagged != 0:
        at = pid * BLOCK + tl.arange(0, BLOCK)
        nan = (tl.zeros((BLOCK,), tl.int32) + 0x7FC00000).to(tl.float32, bitcast=True)
        tl.store(out + at, nan, mask=at < numel)
    else:
        j = tl.arange(0, KP)
        for w in range(count):
            base = w * stride
            raw = tl.load(payloads_i16 + ((base + records_offset) >> 1) + pid * K + j, mask=j < K, other=0)
            # A zero record that is not the first is padding: adding it would race with element 0's record.
            real = (raw != 0) | (j == 0)
            index = raw.to(tl.int32) & (BLOCK - 1)
            code = (raw >> (16 - VALUE_BITS)).to(tl.float32)
            scale = _power(tl.load(payloads + base + SCALES + pid).to(tl.int32))
            target = out + pid * BLOCK + index
            value = tl.load(target, mask=real, other=0.0) + (code * scale) * weight
            tl.debug_barrier()
            tl.store(target, value, mask=real)
            tl.debug_barrier()


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_floats(reference_tensor: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            _need(tensor.dtype == torch.float32, f"{name}: float32 wanted, got {tensor.dtype}")
            _need(tensor.is_contiguous() and tensor.ndim == 1, f"{name}: a contiguous vector wanted")
            _need(tensor.shape == reference_tensor.shape, f"{name}: as many elements as the others wanted")
            _need(tensor.device == reference_tensor.device, f"{name}: on {tensor.device}, others elsewhere")


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit value."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def encode(
    spec: TopKSpec,
    grad: torch.Tensor,
    e_in: torch.Tensor | None,
    e_out: torch.Tensor | None,
    payload: torch.Tensor,
    digest: int = 0,
) -> None:
    """``reference.encode`` on the device's current stream; the flag is in the payload, not returned.

    Shapes: grad, e_in, e_out (numel,) fp32, contiguous; payload (spec.nbytes(numel),) uint8, 16-byte aligned.
    e_out may be e_in, which then costs one copy of it (what a non-finite shard is restored from).

    Raises:
        ValueError: a dtype, shape, device or alignment that the kernel cannot take.
    """
    numel, (block, k, value_bits) = grad.numel(), spec.layout
    _need(not spec.sign, f"{spec}: no device kernel for signs")
    _check_floats(grad, grad=grad, e_in=e_in, e_out=e_out)
    _need(payload.dtype == torch.uint8 and payload.is_contiguous(), "payload: contiguous uint8 wanted")
    _need(payload.shape == (spec.nbytes(numel),), "payload: spec.nbytes(numel) bytes wanted")
    _need(payload.device == grad.device, "payload: on another device than grad")
    _need(payload.data_ptr() % 16 == 0, "payload: 16-byte alignment wanted")
    head = reference.header(spec, numel, digest=digest, flags=0)
    clean = reference.checksum(head)
    head.view(HEADER_DTYPE)["checksum"] = clean
    payload.zero_()
    payload[:HEADER_NBYTES] = torch.from_numpy(head).to(payload.device)
    if numel == 0:
        return
    source = e_in
    if e_in is not None and e_out is not None and e_in.data_ptr() == e_out.data_ptr():
        source = e_in.clone()
    views = (payload, payload.view(torch.int16), payload.view(torch.int32), payload.view(torch.int64))
    grid = (spec.nblocks(numel),)
    start = spec.records_offset(numel)
    has = {"HAS_IN": source is not None, "HAS_OUT": e_out is not None}
    given_in, given_out = grad if source is None else source, grad if e_out is None else e_out
    _encode[grid](
        grad, given_in, given_out, *views, numel, start,
        BLOCK=block, K=k, VALUE_BITS=value_bits, **has, **LAUNCH,
    )  # fmt: skip
    _withdraw[grid](
        given_in, given_out, *views, numel, start, _signed(clean + FLAG_NONFINITE * FLAGS_FACTOR),
        BLOCK=block, K=k, KP=triton.next_power_of_2(k), **has, **LAUNCH,
    )  # fmt: skip


def decode_add(
    spec: TopKSpec,
    payloads: torch.Tensor,
    out: torch.Tensor,
    weight: float = 1.0,
    digest: int = 0,
    *,
    check: bool = True,
) -> None:
    """``reference.decode_add`` on the device's current stream.

    Shapes: payloads (count, spec.nbytes(numel)) uint8, contiguous, 16-byte aligned; out (numel,) fp32.
    ``check`` copies the payloads to the host first, which synchronises; without it they must come from a
    trusted encoder.

    Raises:
        PayloadFormatError: a payload is not what spec, size and digest say; ``out`` is then untouched.
        ValueError: a dtype, shape, device or alignment that the kernel cannot take.
    """
    numel, (block, k, value_bits) = out.numel(), spec.layout
    _need(not spec.sign, f"{spec}: no device kernel for signs")
    _check_floats(out, out=out)
    _need(payloads.dtype == torch.uint8 and payloads.is_contiguous(), "payloads: contiguous uint8 wanted")
    _need(payloads.ndim == 2, "payloads: one row per payload wanted")
    _need(payloads.device == out.device, "payloads: on another device than out")
    if payloads.shape[0] and payloads.shape[1] != spec.nbytes(numel):
        raise PayloadFormatError(Status.BAD_NBYTES)
    _need(payloads.data_ptr() % 16 == 0, "payloads: 16-byte alignment wanted")
    if check:
        for position, row in enumerate(payloads.cpu().numpy()):
            status = reference.check(spec, np.ascontiguousarray(row), numel, digest)
            if status is not Status.OK:
                raise PayloadFormatError(status, position)
    if numel == 0 or payloads.shape[0] == 0:
        return
    _decode_add[(spec.nblocks(numel),)](
        payloads, payloads.view(torch.int16), payloads.view(torch.int32), out,
        payloads.shape[0], payloads.shape[1], numel, spec.records_offset(numel), weight,
        BLOCK=block, K=k, KP=triton.next_power_of_2(k), VALUE_BITS=value_bits, **LAUNCH,
    )  # fmt: skip
