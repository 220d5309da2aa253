"""What topk, gtop1 and randk share on the device: a payload of one scale and k values per block, and its host side.

A program takes a block, of any size: regions that end inside a block are masked, which costs no bulk access as long as
their size is a multiple of 16. Reencoding forms the sum where the new residual will be, a block of it in a program's
cache; where that is bf16, in a buffer of its own.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-unimported"

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from hybridcomm.kernels import device_tensors
from hybridcomm.kernels.device import Argument, Budget, DeviceKernel
from hybridcomm.kernels.payload import HEADER_NBYTES
from hybridcomm.kernels.specs.randk import RandKSpec
from hybridcomm.kernels.triton import bits, launch

__all__ = [
    "coded",
    "compensated",
    "decode_add",
    "encode",
    "fill",
    "reencode",
    "seal",
    "shipped",
    "store_rest",
]

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 half to even
STEP = tl.constexpr(512)

SLACK = 1.02  # what may be moved, per byte that has to be
PAYLOADS = 2  # what budgets of kernels that read payloads are for
HALVES = 16  # instructions per element more, at most, to widen and narrow types of 16 bits


@triton.jit
def _widened(x):
    """To fp32; of bf16 by its bits, as Triton's interpreter does not know its denormals."""
    if x.dtype == tl.bfloat16:
        x = bits.as_float(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return x.to(tl.float32)


@triton.jit
def compensated(  # noqa: PLR0917
    grad, e_in, at, inside, decay, HAS_IN: tl.constexpr, DECAYED: tl.constexpr  # noqa: N803
):  # fmt: skip
    """``grad + decay * e_in`` at ``at``, fp32, each operation rounded; zero where not ``inside``."""
    acc = _widened(tl.load(grad + at, mask=inside, other=0.0))
    if HAS_IN:
        e = _widened(tl.load(e_in + at, mask=inside, other=0.0))
        acc = acc + (e * decay if DECAYED else e)
    return acc


@triton.jit
def store_rest(e_out, at, rest, inside):
    """A residual in its own type, fp32 or bf16."""
    if e_out.dtype.element_ty == tl.bfloat16:
        rest = (bits.narrowed(rest) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(e_out + at, rest, mask=inside)


@triton.jit
def coded(acc, largest, VALUE_BITS: tl.constexpr):  # noqa: N803
    """The scale's exponent for a block whose largest magnitude has these bits; codes, as int32; values."""
    exponent = tl.maximum((largest >> 23) + 2 - VALUE_BITS, 1)
    q_max: tl.constexpr = (1 << (VALUE_BITS - 1)) - 1
    code = (acc * bits.as_float((254 - exponent) << 23) + ROUND) - ROUND
    code = tl.minimum(tl.maximum(code, -q_max), q_max)
    return exponent, code.to(tl.int32), code * bits.as_float(exponent << 23)


@triton.jit
def seal(payload, pid, first, exponent, record, real):
    """Writes a block's records, from half word ``first`` of the payload on, and scale; adds them to the checksum."""
    half = first + tl.arange(0, record.shape[0])
    tl.store(payload.to(tl.pointer_type(tl.int16)) + half, record.to(tl.int16), mask=real)
    tl.store(payload + bits.SCALES + pid, exponent.to(tl.uint8))
    share = bits.byte_share(exponent, pid.to(tl.int32) + bits.SCALES)
    bits.add_checksum(payload, tl.where(real, bits.half_share(record, half), 0), share.to(tl.int64))


@triton.jit
def fill(out, word, left, SIZE: tl.constexpr):  # noqa: N803
    """The first ``left`` of SIZE elements become the float whose bits are ``word``."""
    for first in range(0, SIZE, STEP):
        at = first + tl.arange(0, STEP)
        tl.store(out + at, bits.as_float(at * 0 + word), mask=at < left)


def _second(spec: Any, numel: int) -> dict[str, int]:
    """Where the section behind the scales begins, under the name that kernels have for it."""
    if isinstance(spec, RandKSpec):
        return {"codes_at": spec.codes_offset(numel)}
    return {"records_half": spec.records_offset(numel) // 2}


def _emit(  # noqa: PLR0917
    family: launch.Family, kernel: Any, spec: Any, inputs: Mapping[str, Any], numel: int,
    e_in: torch.Tensor | None, e_out: torch.Tensor | None, payload: torch.Tensor,
    digest: int, decay: float, header: device_tensors.Header | None, seed: int,
) -> None:  # fmt: skip
    """What encode and reencode share."""
    device_tensors.check_vectors(numel, payload.device, device_tensors.RESIDUALS, e_in=e_in, e_out=e_out)
    if e_in is not None and e_out is not None:
        device_tensors.need(e_in.dtype == e_out.dtype, "e_in and e_out: one type wanted")
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
        HAS_IN=source is not None, HAS_OUT=e_out is not None, DECAYED=decay != 1.0, **launch.LAUNCH,
    )  # fmt: skip
    launch.restore(family, source, e_out, payload, header)


def encode(  # noqa: PLR0917
    family: launch.Family, spec: Any, grad: torch.Tensor, e_in: torch.Tensor | None, e_out: torch.Tensor | None,
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
    family: launch.Family, spec: Any, payloads: torch.Tensor, numel: int, e_in: torch.Tensor | None,
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
    family: launch.Family, spec: Any, payloads: torch.Tensor, out: torch.Tensor, weight: float = 1.0,
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
        payloads, out, payloads.shape[0], payloads.shape[1], numel, *_second(spec, numel).values(), weight,
        **family.constants(spec), CLEAR=clear, **launch.LAUNCH,
    )  # fmt: skip


_NBYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_SCALARS = {
    "count": Argument(name="count", type="i32", aligned=False),
    "stride": Argument(name="stride", type="i64"),
    "numel": Argument(name="numel", type="i64"),
    "codes_at": Argument(name="codes_at", type="i32", aligned=False),
    "records_half": Argument(name="records_half", type="i32", aligned=False),
    "weight": Argument(name="weight", type="fp32", aligned=False),
    "decay": Argument(name="decay", type="fp32", aligned=False),
}


def _kernel(
    kind: str,
    types: dict[str, str],
    floats: float,
    fixed: dict[str, int],
    factor: float = 1.0,
    *,
    source: str,
    name: str,
    family: launch.Family,
    spec: Any,
    instructions: float,
    cold: float | None,
) -> DeviceKernel:
    """``kind`` of a family; ``floats``: bytes that an element moves; ``factor``: of the budgets of instructions."""
    constants = family.constants(spec)
    warps = constants.pop("num_warps")
    function = getattr(family, kind)
    halves = HALVES * any(t in ("bf16", "fp16") for t in types.values())
    names = [n for n in function.arg_names if n in types or n in _SCALARS]
    marks = [types[n] for n in ("grad", "e_in") if n in types]
    return DeviceKernel(
        name="_".join([name, kind, *(["clear"] if fixed.get("CLEAR") else []), *marks]),
        source=source,
        function=f"{kind}_kernel",
        arguments=tuple(Argument(name=n, type=f"*{types[n]}") if n in types else _SCALARS[n] for n in names),
        constants=tuple((constants | fixed).items()),
        num_warps=warps,
        elements=spec.block,
        budget=Budget(
            nbytes=SLACK * floats,
            instructions=factor * instructions + halves,
            cold=None if cold is None else factor * cold + halves,
            registers=255,
        ),
        codec=str(spec),
    )


def shipped(
    source: str,
    name: str,
    family: launch.Family,
    spec: Any,
    *,
    instructions: float,
    cold: float | None = None,
) -> tuple[DeviceKernel, ...]:
    """Kernels of one spec that are built beforehand, for regions of a multiple of 16 elements, without a decay.

    ``instructions`` and ``cold``: budgets per element where all is fp32. Encoders for all types, with feedback.
    """
    made = partial(
        _kernel, source=source, name=name, family=family, spec=spec, instructions=instructions, cold=cold
    )
    each = spec.nbytes(spec.block << 10) / (spec.block << 10)
    touched = 64 * spec.layout[1] / spec.block  # a record that is added: 32 bytes read, 32 written
    feedback = {"HAS_IN": 1, "HAS_OUT": 1, "DECAYED": 0}
    summed = PAYLOADS * (each + touched)
    return (
        *(
            made(
                "encode",
                {"grad": grad, "e_in": rest, "e_out": rest, "payload": "u8"},
                _NBYTES[grad] + 2 * _NBYTES[rest] + each,
                feedback,
            )
            for grad, rest in (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "bf16"))
        ),
        # The sum is formed in the cache: device memory sees it once, where e_out is fp32 as the new residual.
        *(
            made(
                "reencode",
                {"payloads": "u8", "sums": "fp32", "e_in": rest, "e_out": rest, "payload": "u8"},
                8 + (1 + PAYLOADS) * each,
                feedback,
                2.0,
            )
            for rest in ("fp32", "bf16")
        ),
        made("decode", {"payloads": "u8", "out": "fp32"}, summed, {"CLEAR": 0}),
        made("decode", {"payloads": "u8", "out": "fp32"}, 4 + summed, {"CLEAR": 1}),
    )
