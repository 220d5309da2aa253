"""What the host sides of device kernels ask of tensors, and what every payload begins with; needs torch alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hybridcomm.kernels import reference
from hybridcomm.kernels.payload import FLAG_NONFINITE, HEADER_DTYPE, PayloadFormatError, Status

__all__ = [
    "GRADIENTS",
    "RESIDUALS",
    "Header",
    "check_payload",
    "check_payloads",
    "check_residuals",
    "check_vectors",
    "make_header",
    "need",
]

GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)
RESIDUALS = (torch.float32, torch.bfloat16)

MAX_NBYTES = 1 << 32
"""Of a payload: kernels count its half words in 31 bits."""

FLAGS_FACTOR = 2 * 10 + 1  # what the flags word is multiplied with in the checksum


def need(condition: bool, message: str) -> None:
    """Raises ValueError unless ``condition``."""
    if not condition:
        raise ValueError(message)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit value."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def check_vectors(
    numel: int, device: torch.device, types: tuple[torch.dtype, ...], **tensors: torch.Tensor | None
) -> None:
    """Contiguous vectors of ``numel`` elements of one of ``types``, aligned to 16 bytes, on ``device``; None passes.

    Raises:
        ValueError: which one is not, and what is wrong with it.
    """
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in types)
    for name, tensor in tensors.items():
        if tensor is not None:
            need(tensor.dtype in types, f"{name}: {names} wanted, got {tensor.dtype}")
            need(tensor.is_contiguous() and tensor.ndim == 1, f"{name}: a contiguous vector wanted")
            need(tensor.numel() == numel, f"{name}: as many elements as the others wanted")
            need(tensor.device == device, f"{name}: on {tensor.device}, others elsewhere")
            need(tensor.data_ptr() % 16 == 0, f"{name}: 16-byte alignment wanted")


def check_residuals(
    numel: int,
    device: torch.device,
    e_in: torch.Tensor | None,
    e_out: torch.Tensor | None,
    *,
    apart: bool = False,
) -> None:
    """The residual that is read and the one that is written, of one type; ``apart``: in two buffers.

    Raises:
        ValueError: which one is not so, and what is wrong with it.
    """
    check_vectors(numel, device, RESIDUALS, e_in=e_in, e_out=e_out)
    if e_in is not None and e_out is not None:
        need(e_in.dtype == e_out.dtype, "e_in and e_out: one type wanted")
        need(
            not apart or numel == 0 or e_in.data_ptr() != e_out.data_ptr(),
            "e_out: another buffer than e_in wanted",
        )


def check_payload(payload: torch.Tensor, nbytes: int, device: torch.device) -> None:
    """One payload to write, (nbytes,) uint8.

    Raises:
        ValueError: a dtype, shape, device or alignment that the kernels cannot take.
    """
    need(payload.dtype == torch.uint8 and payload.is_contiguous(), "payload: contiguous uint8 wanted")
    need(payload.shape == (nbytes,), "payload: spec.nbytes(numel) bytes wanted")
    need(payload.device == device, f"payload: on {payload.device}, others elsewhere")
    need(payload.data_ptr() % 16 == 0, "payload: 16-byte alignment wanted")
    need(nbytes <= MAX_NBYTES, f"payload: at most {MAX_NBYTES} bytes, got {nbytes}: use more shards")


def check_payloads(
    spec: Any, payloads: torch.Tensor, numel: int, device: torch.device, digest: int, check: bool
) -> None:
    """Payloads to read, (count, spec.nbytes(numel)) uint8; ``check`` looks at their bytes, on the host.

    Raises:
        PayloadFormatError: a payload is not what spec, size and digest say.
        ValueError: a dtype, shape, device or alignment that the kernels cannot take.
    """
    need(payloads.dtype == torch.uint8 and payloads.is_contiguous(), "payloads: contiguous uint8 wanted")
    need(payloads.ndim == 2, "payloads: one row per payload wanted")
    need(payloads.device == device, f"payloads: on {payloads.device}, others elsewhere")
    need(payloads.data_ptr() % 16 == 0, "payloads: 16-byte alignment wanted")
    if payloads.shape[0] and payloads.shape[1] != spec.nbytes(numel):
        raise PayloadFormatError(Status.BAD_NBYTES)
    need(payloads.shape[1] <= MAX_NBYTES, f"payloads: at most {MAX_NBYTES} bytes each")
    if check:
        for position, row in enumerate(payloads.cpu().numpy()):
            status = reference.check(spec, np.ascontiguousarray(row), numel, digest)
            if status is not Status.OK:
                raise PayloadFormatError(status, position)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What every payload of one (spec, numel, digest) begins with, made once.

    ``template``: (64,) uint8 on the device, the checksum that of the header alone, to which kernels add theirs.
    ``withdrawn``: the checksum of a flagged payload, whose body is zero, as int64.
    """

    template: torch.Tensor
    withdrawn: int


def make_header(spec: Any, numel: int, digest: int, device: torch.device, *, seed: int = 0) -> Header:
    """Copies 64 bytes to the device, so it belongs before a graph's capture."""
    head = reference.header(spec, numel, digest=digest, flags=0, seed=seed)
    clean = reference.checksum(head)
    head.view(HEADER_DTYPE)["checksum"] = clean
    template = torch.from_numpy(head).to(device)
    return Header(template=template, withdrawn=_signed(clean + FLAG_NONFINITE * FLAGS_FACTOR))
