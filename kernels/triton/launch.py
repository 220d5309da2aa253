"""Host side of Triton's kernels, of `codes` above all: checks, the header, which kernel runs on how many programs.

Everything runs on the device's current stream and nothing waits for it. ``encode`` and ``reencode`` can be captured
into a CUDA graph if they are given a ``Header`` made before, and two buffers for the residual.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hybridcomm.kernels.device_tensors import (
    GRADIENTS,
    Header,
    check_payload,
    check_payloads,
    check_residuals,
    check_vectors,
    make_header,
)
from hybridcomm.kernels.payload import HEADER_NBYTES
from hybridcomm.kernels.specs.quant import QuantSpec
from hybridcomm.kernels.triton import withdraw
from hybridcomm.kernels.triton.family import Family
from hybridcomm.kernels.triton.function import LAUNCH
from hybridcomm.kernels.triton.shipped import elements, warps

__all__ = ["decode_add", "encode", "reencode", "restore"]


def restore(
    family: Family,
    e_in: torch.Tensor | None,
    e_out: torch.Tensor | None,
    payload: torch.Tensor,
    header: Header,
) -> None:
    """The withdrawing pass behind an encoder; ``e_in`` is what the encoder read, and not ``e_out``."""
    numel = 0 if e_out is None else e_out.numel()
    nwords = (payload.numel() - HEADER_NBYTES) // 4
    grid = (max(-(-max(numel, nwords) // withdraw.ELEMENTS), 1),)
    family.withdraw[grid](
        e_in=payload if e_in is None else e_in, e_out=payload if e_out is None else e_out, payload=payload,
        nwords=nwords, numel=numel, checksum=header.withdrawn, HAS_IN=e_in is not None, HAS_OUT=e_out is not None,
        num_warps=withdraw.WARPS, **LAUNCH,
    )  # fmt: skip


def _run(
    kernel: Any, spec: QuantSpec, numel: int, arguments: Mapping[str, Any], constants: Mapping[str, Any],
    *, narrow: bool = False,
) -> None:  # fmt: skip
    """Whole programs without a mask, for bulk accesses of 128 bits, and one with it for what is left."""
    size = elements(spec)
    programs, left = divmod(numel, size)
    for whole, first, count in ((True, 0, programs), (False, programs, min(left, 1))):
        if count:
            kernel[(count,)](
                **arguments, numel=numel, first=first, codes=spec.codes_offset(numel) // 16,
                ELEMENTS=size, WHOLE=whole, num_warps=warps(spec, whole=whole, narrow=narrow),
                **constants, **LAUNCH,
            )  # fmt: skip


def _begin(spec: QuantSpec, numel: int, payload: torch.Tensor, header: Header) -> None:
    """Header and the scales' padding, where no program has it: they write whole multiples of 16 bytes or their own."""
    payload[:HEADER_NBYTES].copy_(header.template)
    end = HEADER_NBYTES + spec.scale_nbytes * spec.nblocks(numel)
    if elements(spec) // spec.block * spec.scale_nbytes % 16:
        payload[end : spec.codes_offset(numel)].zero_()


def _emit(  # noqa: PLR0917
    family: Family, kernel: Any, spec: QuantSpec, numel: int, inputs: Mapping[str, Any], types: tuple[torch.dtype, ...],
    e_in: torch.Tensor | None, e_out: torch.Tensor | None, payload: torch.Tensor,
    digest: int, decay: float, header: Header | None,
) -> None:  # fmt: skip
    """What encode and reencode share."""
    device = payload.device
    check_residuals(numel, device, e_in, e_out)
    residuals = [e.dtype for e in (e_in, e_out) if e is not None]
    check_payload(payload, spec.nbytes(numel), device)
    header = make_header(spec, numel, digest, device) if header is None else header
    _begin(spec, numel, payload, header)
    if numel == 0:
        return
    source = (
        e_in.clone()
        if e_in is not None and e_out is not None and e_in.data_ptr() == e_out.data_ptr()
        else e_in
    )
    unused = payload.view(torch.float32)
    narrow = any(dtype.itemsize == 2 for dtype in residuals)
    half = narrow or any(dtype.itemsize == 2 for dtype in types)
    arguments = {
        **inputs, "e_in": unused if source is None else source, "e_out": unused if e_out is None else e_out,
        "payload": payload, "decay": decay,
    }  # fmt: skip
    constants = {
        **family.constants(spec), "VECTOR": 8 if half else 4,
        "HAS_IN": source is not None, "HAS_OUT": e_out is not None, "DECAYED": decay != 1.0,
    }  # fmt: skip
    _run(kernel, spec, numel, arguments, constants, narrow=narrow)
    restore(family, source, e_out, payload, header)


def encode(  # noqa: PLR0917
    family: Family,
    spec: QuantSpec,
    grad: torch.Tensor,
    e_in: torch.Tensor | None,
    e_out: torch.Tensor | None,
    payload: torch.Tensor,
    digest: int = 0,
    *,
    decay: float = 1.0,
    header: Header | None = None,
) -> None:
    """``reference.encode`` on the device's current stream; the flag is in the payload, not returned.

    Shapes: grad (numel,) fp32, bf16 or fp16; e_in, e_out (numel,) fp32 or bf16, both the same; payload
    (spec.nbytes(numel),) uint8; all contiguous and aligned to 16 bytes. A bf16 residual is what fp32 would be,
    rounded half to even. e_out may be e_in, which then costs one copy of it (what a non-finite shard is restored
    from). ``header``: from ``make_header`` with the same spec, numel and digest; made here if not given.

    Raises:
        ValueError: a dtype, shape, device or alignment that the kernel cannot take.
    """
    check_vectors(grad.numel(), payload.device, GRADIENTS, grad=grad)
    _emit(
        family, family.encode, spec, grad.numel(), {"grad": grad}, (grad.dtype,),
        e_in, e_out, payload, digest, decay, header,
    )  # fmt: skip


def reencode(  # noqa: PLR0917
    family: Family,
    spec: QuantSpec,
    payloads: torch.Tensor,
    numel: int,
    e_in: torch.Tensor | None,
    e_out: torch.Tensor | None,
    payload: torch.Tensor,
    digest: int = 0,
    *,
    weight: float = 1.0,
    decay: float = 1.0,
    header: Header | None = None,
    check: bool = True,
) -> None:
    """Encodes the sum of payloads, ``decode_add`` of them to zeros, in one pass; the sum is not written.

    What the owner of a slice does in the two-stage exchange. ``payloads`` as in ``decode_add``, of ``numel``
    elements; the rest as in ``encode``. A flagged payload among them flags the new one.

    Raises:
        PayloadFormatError: a payload is not what spec, size and digest say; nothing is written then.
        ValueError: a dtype, shape, device or alignment that the kernel cannot take.
    """
    check_payloads(spec, payloads, numel, payload.device, digest, check)
    inputs = {
        "payloads": payloads, "count": payloads.shape[0], "stride": payloads.shape[1], "weight": weight,
    }  # fmt: skip
    _emit(family, family.reencode, spec, numel, inputs, (), e_in, e_out, payload, digest, decay, header)


def decode_add(
    family: Family,
    spec: QuantSpec,
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
    numel = out.numel()
    check_vectors(numel, out.device, (torch.float32,), out=out)
    check_payloads(spec, payloads, numel, out.device, digest, check)
    if numel == 0 or payloads.shape[0] == 0:
        return
    arguments = {
        "payloads": payloads, "out": out, "count": payloads.shape[0], "stride": payloads.shape[1], "weight": weight,
    }  # fmt: skip
    _run(family.decode, spec, numel, arguments, family.constants(spec))
