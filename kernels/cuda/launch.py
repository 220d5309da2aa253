"""Host side of the kernels in CUDA C++: checks, the header, which kernels run in which order.

``run`` launches (`cubins.launcher.Run`); nothing waits. ``encode`` and ``reencode`` can be captured into a CUDA graph
if they are given a ``Header`` and, for gtopk, a workspace made before. Regions are multiples of 16 elements: buckets
are padded, so that all accesses are wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hybridcomm.kernels.cuda import gtopk, topk
from hybridcomm.kernels.device_tensors import (
    GRADIENTS,
    Header,
    check_payload,
    check_payloads,
    check_residuals,
    check_vectors,
    make_header,
    need,
)
from hybridcomm.kernels.payload import HEADER_NBYTES

if TYPE_CHECKING:
    from hybridcomm.kernels.cubins.launcher import Run
    from hybridcomm.kernels.device import DeviceKernel

__all__ = [
    "NAMES",
    "begin",
    "check_region",
    "decode_add",
    "encode",
    "make_workspace",
    "reencode",
    "start",
]

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Of types, in those of kernels."""
_SPECS = (topk.SPEC, gtopk.SPEC)
_TOPK: Mapping[str, DeviceKernel] = {kernel.name: kernel for kernel in topk.KERNELS}


def make_workspace(numel: int, device: torch.device, rest: torch.dtype = torch.float32) -> torch.Tensor:
    """Device memory for gtopk over ``numel`` elements with residuals of type ``rest``, (nbytes,) uint8; calls on one
    stream may share it."""
    nbytes, _ = gtopk.workspace(numel, NAMES[rest])
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def start(run: Run, kernel: DeviceKernel, numel: int, *arguments: Any, programs: int | None = None) -> None:
    """One kernel over ``numel`` elements, its arguments in order; ``programs``: where sizes do not say how many."""
    names = (argument.name for argument in kernel.arguments)
    run(
        kernel, kernel.grid(numel) if programs is None else programs, dict(zip(names, arguments, strict=True))
    )


def _enqueue(run: Run, steps: Sequence[gtopk.Launch], buffers: Mapping[str, torch.Tensor | None]) -> None:
    for step in steps:
        values = [_value(argument, buffers) for argument in step.arguments]
        names = (argument.name for argument in step.kernel.arguments)
        run(step.kernel, step.programs, dict(zip(names, values, strict=True)))


def _value(argument: Any, buffers: Mapping[str, torch.Tensor | None]) -> Any:
    if not isinstance(argument, gtopk.At):
        return argument
    buffer = buffers[argument.buffer]
    return buffer if buffer is None or not argument.offset else buffer[argument.offset :]


def check_region(spec: Any, specs: Sequence[Any], numel: int) -> None:
    """Raises ValueError unless ``spec`` is one of ``specs``, and a region of ``numel`` elements is padded."""
    need(spec in specs, f"{spec}: CUDA kernels are there for {', '.join(map(str, specs))} alone")
    need(numel % 16 == 0, f"a region of {numel} elements: pad to a multiple of 16")


def begin(
    spec: Any,
    numel: int,
    e_in: torch.Tensor | None,
    e_out: torch.Tensor,
    payload: torch.Tensor,
    header: Header,
) -> None:
    """Checks what an encoder writes to and the residual that it reads; writes the header.

    Raises:
        ValueError: a dtype, shape, device or alignment that the kernels cannot take, or one buffer for both residuals.
    """
    check_residuals(numel, payload.device, e_in, e_out, apart=True)
    check_payload(payload, spec.nbytes(numel), payload.device)
    payload[:HEADER_NBYTES].copy_(header.template)


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
    workspace: torch.Tensor | None = None,
) -> None:
    """``reference.encode`` of ``topk:0.01`` or ``gtopk:0.01``; the flag is in the payload, not returned.

    Shapes: grad (numel,) fp32, bf16 or fp16; e_in, e_out (numel,), two buffers, fp32 or bf16; payload
    (spec.nbytes(numel),) uint8; numel a multiple of 16; all contiguous and aligned to 16 bytes.

    Raises:
        ValueError: a dtype, shape, device or alignment that the kernels cannot take.
    """
    numel = grad.numel()
    check_region(spec, _SPECS, numel)
    check_vectors(numel, payload.device, GRADIENTS, grad=grad)
    header = make_header(spec, numel, digest, payload.device) if header is None else header
    begin(spec, numel, e_in, e_out, payload, header)
    payload[HEADER_NBYTES:].zero_()
    if numel == 0:
        return
    if spec == topk.SPEC:
        kernel = _TOPK[f"topk_encode_{NAMES[grad.dtype]}_{NAMES[e_out.dtype]}"]
        start(run, kernel, numel, grad, e_in, e_out, payload, numel, spec.records_offset(numel), decay)
        _withdraw(run, e_in, e_out, payload, header)
        return
    rest = NAMES[e_out.dtype]
    workspace = make_workspace(numel, payload.device, e_out.dtype) if workspace is None else workspace
    nbytes, cleared = gtopk.workspace(numel, rest)
    need(workspace.numel() >= nbytes, f"workspace: {nbytes} bytes wanted, got {workspace.numel()}")
    workspace[:cleared].zero_()
    steps = gtopk.encode_steps(
        numel, NAMES[grad.dtype], rest, feedback=e_in is not None, decay=decay, withdrawn=header.withdrawn
    )
    _enqueue(
        run, steps, {"grad": grad, "e_in": e_in, "e_out": e_out, "payload": payload, "workspace": workspace}
    )


def _withdraw(
    run: Run, e_in: torch.Tensor | None, e_out: torch.Tensor, payload: torch.Tensor, header: Header
) -> None:
    numel, kernel = e_out.numel(), _TOPK[f"topk_withdraw_{NAMES[e_out.dtype]}"]
    records_at = topk.SPEC.records_offset(numel)
    start(run, kernel, numel, e_in, e_out, payload, numel, records_at, header.withdrawn)


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
) -> None:
    """Encodes the sum of payloads of ``topk:0.01`` in one pass; the sum is not written. The rest as in ``encode``.

    Raises:
        PayloadFormatError: a payload is not what spec, size and digest say; nothing is written then.
        ValueError: a dtype, shape, device or alignment that the kernels cannot take.
    """
    need(spec == topk.SPEC, f"{spec}: sums are encoded anew for {topk.SPEC} alone")
    check_region(spec, _SPECS, numel)
    check_payloads(spec, payloads, numel, payload.device, digest, check)
    header = make_header(spec, numel, digest, payload.device) if header is None else header
    begin(spec, numel, e_in, e_out, payload, header)
    payload[HEADER_NBYTES:].zero_()
    if numel == 0:
        return
    sizes = payloads.shape[0], payloads.shape[1], numel, spec.records_offset(numel)
    kernel = _TOPK[f"topk_reencode_{NAMES[e_out.dtype]}"]
    start(run, kernel, numel, payloads, e_in, e_out, payload, *sizes, weight, decay)
    _withdraw(run, e_in, e_out, payload, header)


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
    workspace: torch.Tensor | None = None,
) -> None:
    """``reference.decode_add`` of payloads (count, spec.nbytes(numel)) uint8 to out (numel,) fp32.

    ``clear``: out begins as zeros, whatever it holds. ``check`` looks at the payloads' bytes on the host, which
    synchronises; without it they must come from a trusted encoder.

    Raises:
        PayloadFormatError: a payload is not what spec, size and digest say; ``out`` is then untouched.
        ValueError: a dtype, shape, device or alignment that the kernels cannot take.
    """
    numel = out.numel()
    check_region(spec, _SPECS, numel)
    check_vectors(numel, out.device, (torch.float32,), out=out)
    check_payloads(spec, payloads, numel, out.device, digest, check)
    if clear and (spec != topk.SPEC or payloads.shape[0] == 0):
        out.zero_()
    if payloads.shape[0] == 0 or numel == 0:
        return
    if spec == topk.SPEC:
        kernel = _TOPK["topk_decode" if clear else "topk_decode_add"]
        sizes = payloads.shape[0], payloads.shape[1], numel, spec.records_offset(numel)
        start(run, kernel, numel, payloads, out, *sizes, weight)
        return
    workspace = make_workspace(numel, out.device) if workspace is None else workspace
    steps = gtopk.decode_steps(numel, payloads.shape[0], weight=weight)
    _enqueue(run, steps, {"payloads": payloads.view(-1), "out": out, "workspace": workspace})
