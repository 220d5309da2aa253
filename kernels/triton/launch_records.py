"""Host side of topk, gtop1 and randk in Triton; what `launch` says of the others holds here too.

Reencoding forms the sum where the new residual will be; where that is bf16, in a buffer of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hybridcomm.kernels import device_tensors
from hybridcomm.kernels.payload import HEADER_NBYTES
from hybridcomm.kernels.specs.randk import RandKSpec
from hybridcomm.kernels.triton.family import Family
from hybridcomm.kernels.triton.function import LAUNCH
from hybridcomm.kernels.triton.launch import restore

__all__ = ["decode_add", "encode", "reencode"]


def _second(spec: Any, numel: int) -> dict[str, int]:
    """Where the section behind the scales begins, under the name that kernels have for it."""
    if isinstance(spec, RandKSpec):
        return {"codes_at": spec.codes_offset(numel)}
    return {"records_half": spec.records_offset(numel) // 2}


def _emit(  # noqa: PLR0917
    family: Family, kernel: Any, spec: Any, inputs: Mapping[str, Any], numel: int,
    e_in: torch.Tensor | None, e_out: torch.Tensor | None, payload: torch.Tensor,
    digest: int, decay: float, header: device_tensors.Header | None, seed: int,
) -> None:  # fmt: skip
    """What encode and reencode share."""
    device_tensors.check_residuals(numel, payload.device, e_in, e_out)
    device_tensors.check_payload(payload, spec.nbytes(numel), payload.device)
    if header is None:
        header = device_tensors.make_header(spec, numel, digest, payload.device, seed=seed)
    payload[:HEADER_NBYTES].copy_(header.template)
    payload[HEADER_NBYTES:].zero_()  # what pads the sections
    if numel == 0:
        return
    shared = e_in is not None and e_out is not None and e_in.data_ptr() == e_out.data_ptr()
    source = e_in.clone() if shared and e_in is not None else e_in
    unused = payload.view(torch.float32)
    kernel[(spec.nblocks(numel),)](
        **inputs, e_in=unused if source is None else source, e_out=unused if e_out is None else e_out,
        payload=payload, numel=numel, decay=decay, **_second(spec, numel),
        **family.constants(spec),
        HAS_IN=source is not None, HAS_OUT=e_out is not None, DECAYED=decay != 1.0, **LAUNCH,
    )  # fmt: skip
    restore(family, source, e_out, payload, header)


def encode(  # noqa: PLR0917
    family: Family, spec: Any, grad: torch.Tensor, e_in: torch.Tensor | None, e_out: torch.Tensor | None,
    payload: torch.Tensor, digest: int = 0, *, decay: float = 1.0, header: device_tensors.Header | None = None,
    seed: int = 0,
) -> None:  # fmt: skip
    """``reference.encode`` on the device's current stream; shapes, types and errors as ``launch.encode``.

    ``seed``: what randk draws by, where no header is given that has one.
    """
    device_tensors.check_vectors(grad.numel(), payload.device, device_tensors.GRADIENTS, grad=grad)
    _emit(
        family, family.encode, spec, {"grad": grad}, grad.numel(), e_in, e_out, payload, digest, decay, header, seed
    )  # fmt: skip


def reencode(  # noqa: PLR0917
    family: Family, spec: Any, payloads: torch.Tensor, numel: int, e_in: torch.Tensor | None,
    e_out: torch.Tensor, payload: torch.Tensor, digest: int = 0, *, weight: float = 1.0, decay: float = 1.0,
    header: device_tensors.Header | None = None, check: bool = True, seed: int = 0,
) -> None:  # fmt: skip
    """Encodes the sum of payloads in one pass; as ``launch.reencode``, but e_out has to be there."""
    device_tensors.check_payloads(spec, payloads, numel, payload.device, digest, check)
    fp32 = e_out.dtype == torch.float32
    sums = e_out if fp32 else torch.empty(numel, dtype=torch.float32, device=e_out.device)
    inputs = {
        "payloads": payloads,
        "sums": sums,
        "count": payloads.shape[0],
        "stride": payloads.shape[1],
        "weight": weight,
    }
    _emit(family, family.reencode, spec, inputs, numel, e_in, e_out, payload, digest, decay, header, seed)


def decode_add(
    family: Family, spec: Any, payloads: torch.Tensor, out: torch.Tensor, weight: float = 1.0,
    digest: int = 0, *, clear: bool = False, check: bool = True,
) -> None:  # fmt: skip
    """``reference.decode_add`` on the device's current stream; shapes, types and errors as ``launch.decode_add``.

    ``clear``: out begins as zeros, whatever it holds.
    """
    numel = out.numel()
    device_tensors.check_vectors(numel, out.device, (torch.float32,), out=out)
    device_tensors.check_payloads(spec, payloads, numel, out.device, digest, check)
    if numel == 0 or (payloads.shape[0] == 0 and not clear):
        return
    family.decode[(spec.nblocks(numel),)](
        payloads=payloads, out=out, count=payloads.shape[0], stride=payloads.shape[1], numel=numel,
        **_second(spec, numel), weight=weight, **family.constants(spec), CLEAR=clear, **LAUNCH,
    )  # fmt: skip
