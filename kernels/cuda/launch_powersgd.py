"""Host side of powersgd's kernels: which run in which order; what `launch` says of the others holds here too.

Between the passes acc lies in e_out; where residuals are bf16, in a buffer of its own. Nothing is cleared before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hybridcomm.kernels.cuda import powersgd
from hybridcomm.kernels.cuda.launch import NAMES, begin, check_region, start
from hybridcomm.kernels.device_tensors import (
    GRADIENTS,
    Header,
    check_payloads,
    check_vectors,
    make_header,
)

if TYPE_CHECKING:
    from hybridcomm.kernels.cubins.launcher import Run
    from hybridcomm.kernels.device import DeviceKernel

__all__ = ["decode_add", "encode", "reencode"]

_KERNELS: Mapping[str, DeviceKernel] = {kernel.name: kernel for kernel in powersgd.KERNELS}


def _emit(  # noqa: PLR0917
    run: Run,
    spec: Any,
    numel: int,
    first: tuple[str, tuple[Any, ...], tuple[Any, ...]],
    e_in: torch.Tensor | None,
    e_out: torch.Tensor,
    payload: torch.Tensor,
    header: Header,
) -> None:
    """What encode and reencode share. ``first``: the kernel that forms acc, its arguments before and behind e_in, acc
    and payload."""
    begin(spec, numel, e_in, e_out, payload, header)
    if numel == 0:
        return
    fp32 = e_out.dtype == torch.float32
    acc = e_out if fp32 else torch.empty(numel, dtype=torch.float32, device=payload.device)
    name, before, behind = first
    ranked, rest = f"powersgd{spec.rank}", NAMES[e_out.dtype]
    start(run, _KERNELS[name], numel, *before, e_in, acc, payload, *behind)
    start(run, _KERNELS[f"{ranked}_left"], numel, acc, payload, numel)
    start(run, _KERNELS[f"{ranked}_orthonormal"], numel, payload, numel)
    start(run, _KERNELS[f"{ranked}_right"], numel, acc, payload, numel, programs=powersgd.ACROSS)
    start(run, _KERNELS[f"{ranked}_rest_{rest}"], numel, acc, e_in, e_out, payload, numel, header.withdrawn)


def encode(  # noqa: PLR0917
    run: Run,
    spec: Any,
    grad: torch.Tensor,
    e_in: torch.Tensor | None,
    e_out: torch.Tensor,
    payload: torch.Tensor,
    digest: int = 0,
    *,
    decay: float = 1.0,
    header: Header | None = None,
    seed: int = 0,
) -> None:
    """``reference.encode`` of ``powersgd:1``, ``:2`` or ``:4``; shapes, types and errors as `launch.encode`.

    ``seed``: what the iteration starts from, where no header is given that has one.
    """
    numel = grad.numel()
    check_region(spec, powersgd.SPECS, numel)
    check_vectors(numel, payload.device, GRADIENTS, grad=grad)
    header = make_header(spec, numel, digest, payload.device, seed=seed) if header is None else header
    first = f"powersgd_encode_{NAMES[grad.dtype]}_{NAMES[e_out.dtype]}", (grad,), (numel, decay)
    _emit(run, spec, numel, first, e_in, e_out, payload, header)


def reencode(  # noqa: PLR0917
    run: Run,
    spec: Any,
    payloads: torch.Tensor,
    numel: int,
    e_in: torch.Tensor | None,
    e_out: torch.Tensor,
    payload: torch.Tensor,
    digest: int = 0,
    *,
    weight: float = 1.0,
    decay: float = 1.0,
    header: Header | None = None,
    check: bool = True,
    seed: int = 0,
) -> None:
    """Encodes the sum of payloads, which is not written; the rest as in ``encode``.

    Raises:
        PayloadFormatError: a payload is not what spec, size and digest say; nothing is written then.
        ValueError: a dtype, shape, device or alignment that the kernels cannot take.
    """
    check_region(spec, powersgd.SPECS, numel)
    check_payloads(spec, payloads, numel, payload.device, digest, check)
    header = make_header(spec, numel, digest, payload.device, seed=seed) if header is None else header
    sizes = payloads.shape[0], payloads.shape[1], numel, weight, decay
    first = f"powersgd{spec.rank}_reencode_{NAMES[e_out.dtype]}", (payloads,), sizes
    _emit(run, spec, numel, first, e_in, e_out, payload, header)


def decode_add(
    run: Run,
    spec: Any,
    payloads: torch.Tensor,
    out: torch.Tensor,
    weight: float = 1.0,
    digest: int = 0,
    *,
    clear: bool = False,
    check: bool = True,
) -> None:
    """``reference.decode_add``; shapes, types and errors as `launch.decode_add`."""
    numel = out.numel()
    check_region(spec, powersgd.SPECS, numel)
    check_vectors(numel, out.device, (torch.float32,), out=out)
    check_payloads(spec, payloads, numel, out.device, digest, check)
    if numel == 0:
        return
    if payloads.shape[0] == 0:
        if clear:
            out.zero_()
        return
    kernel = _KERNELS[f"powersgd{spec.rank}_decode{'' if clear else '_add'}"]
    start(run, kernel, numel, payloads, out, payloads.shape[0], payloads.shape[1], numel, weight)
