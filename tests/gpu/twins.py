"""Host twins of the shipped device kernels: what the programs of a launch do to memory, by the host's codecs.

A twin takes nothing for granted that its kernel does not: it finds the sections of a payload where the arguments say,
adds its share to the checksum that stands in the header, and leaves what another launch has to mend (the body and
the residual of a shard that is not finite) in a state that fails every comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcomm.kernels import HEADER_NBYTES, PayloadFormatError, host, parse, reference
from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.kernels.oracles.bits import QUIET_NAN
from hybridcomm.kernels.payload import HEADER_DTYPE
from hybridcomm.kernels.specs.quant import QuantSpec
from tests.gpu import twins_gtopk, twins_powersgd
from tests.gpu.calls import Array, Call
from tests.gpu.twin_parts import add_checksum, any_flag, flags, narrowed, poison, put_checksum, widened

__all__ = ["Twin", "twin_of"]

Twin = Callable[[Call], None]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def twin_of(kernel: DeviceKernel) -> Twin:
    """Raises KeyError where there is none."""
    if kernel.source == "cuda/gtopk.cu":
        return twins_gtopk.TWINS[kernel.function.removeprefix("gtopk_").split("_")[0]]
    if kernel.source == "cuda/powersgd.cu":
        return twins_powersgd.TWINS[kernel.function.split("_")[1]]
    return TWINS[kernel.function.removeprefix("topk_").split("_")[0].removesuffix("_kernel")]


def _span(call: Call) -> tuple[int, int]:
    """First and last element of the launch's programs."""
    first, size = call.number("first") if call.has("first") else 0, call.kernel.elements
    return first * size, min((first + call.programs) * size, call.number("numel"))


def _sections(call: Call, spec: Any, first: int, last: int) -> tuple[tuple[int, int, int], ...]:
    """Of the scales, and of what is behind them: where the span's part stands in a payload of its own, where in the
    region's payload, and its length."""
    if isinstance(spec, QuantSpec):
        numel = last - first
        codes, end = spec.codes_offset(numel), spec.nbytes(numel)
        scale = HEADER_NBYTES + spec.scale_nbytes * first // spec.block
        code = 16 * call.number("codes") + first * spec.value_bits // 8
        return (HEADER_NBYTES, scale, codes - HEADER_NBYTES), (codes, code, end - codes)
    blocks, k = spec.nblocks(last), spec.layout[1]
    if call.has("codes_at"):
        return (HEADER_NBYTES, HEADER_NBYTES, blocks), (
            spec.codes_offset(last),
            call.number("codes_at"),
            k * blocks,
        )
    at = 2 * call.number("records_half") if call.has("records_half") else call.number("records_at")
    return (HEADER_NBYTES, HEADER_NBYTES, blocks), (spec.records_offset(last), at, 2 * k * blocks)


def _seed(payload: Bytes) -> int:
    return int(payload[56:64].view("<u8")[0])


def _emit(call: Call, grad: Floats) -> None:
    """The span's part of encoding; ``grad`` is the span's, fp32."""
    spec, (first, last) = parse(call.kernel.codec), _span(call)
    e_in = e_out = None
    if call.values["e_in"]:
        e_in = widened(call.array("e_in", first, last - first), call.kind("e_in"))
    if call.values["e_out"]:
        e_out = call.array("e_out", first, last - first)
    rest, made = np.empty(last - first, np.float32), np.empty(spec.nbytes(last - first), np.uint8)
    head = call.bytes("payload", 0, HEADER_NBYTES)
    decay = 1.0 if call.constant("HAS_IN") and not call.constant("DECAYED") else float(call.real("decay"))
    seed = _seed(head) if spec.seeded else 0
    flagged = host.encode(spec, grad, e_in, rest, made, 0, decay=decay, seed=seed)
    flags(head)[0] |= flagged
    for source, at, nbytes in _sections(call, spec, first, last):
        target = call.bytes("payload", at, nbytes)
        target[:] = made[source : source + nbytes]
        add_checksum(head, target, at)
        if flagged:
            poison(target)
    if e_out is not None:
        e_out[:] = narrowed(rest, call.kind("e_out"))
        if flagged:
            poison(e_out)


def _encode(call: Call) -> None:
    first, last = _span(call)
    _emit(call, widened(call.array("grad", first, last - first), call.kind("grad")))


def _part(call: Call, spec: Any, position: int, first: int, last: int) -> Bytes:
    """The span's part of a payload as a payload of its own."""
    whole = call.view(call.number("payloads") + position * call.number("stride"), HEADER_NBYTES)
    seed = _seed(whole) if spec.seeded else 0
    made = np.zeros(spec.nbytes(last - first), np.uint8)
    made[:HEADER_NBYTES] = reference.header(spec, last - first, digest=0, flags=0, seed=seed)
    for target, at, nbytes in _sections(call, spec, first, last):
        part = call.view(call.number("payloads") + position * call.number("stride") + at, nbytes)
        made[target : target + nbytes] = part
    made[:HEADER_NBYTES].view(HEADER_DTYPE)["checksum"] = reference.checksum(made)
    return made


def _add(call: Call, out: Floats) -> bool:
    """Adds the span's part of all payloads; whether one is flagged, and nothing was added. What no encoder writes makes
    of ``out`` what nobody can use."""
    spec, (first, last), count = parse(call.kernel.codec), _span(call), call.number("count")
    if any_flag(call, "payloads", count, call.number("stride")):
        return True
    parts = [_part(call, spec, position, first, last) for position in range(count)]
    try:
        host.decode_add(spec, parts, out, float(call.real("weight")), 0)
    except PayloadFormatError:
        poison(out)
    return False


def _reencode(call: Call) -> None:
    first, last = _span(call)
    total = np.zeros(last - first, np.float32)
    if _add(call, total):
        total[:] = QUIET_NAN
    if call.has("sums"):
        call.array("sums", first, last - first)[:] = total
    _emit(call, total)


def _decode(call: Call) -> None:
    first, last = _span(call)
    out = call.array("out", first, last - first)
    if call.constant("CLEAR") or call.kernel.function == "topk_decode":
        out[:] = 0
    if _add(call, out):
        out[:] = QUIET_NAN


def _withdraw(call: Call) -> None:
    head, numel = call.bytes("payload", 0, HEADER_NBYTES), call.number("numel")
    if not flags(head)[0]:
        return
    if call.has("nwords"):
        call.bytes("payload", HEADER_NBYTES, 4 * call.number("nwords"))[:] = 0
    else:
        numel = call.reach()
        for _, at, nbytes in _sections(call, parse(call.kernel.codec), 0, numel):
            call.bytes("payload", at, nbytes)[:] = 0
    if call.values["e_out"]:
        call.array("e_out", 0, numel)[:] = call.array("e_in", 0, numel) if call.values["e_in"] else 0
    put_checksum(head, call.number("checksum"))


_KINDS = ("fp32", "bf16", "fp16")


def _rounded(x: Floats, kind: str) -> Array:
    """Half to even, infinity where there is more than the type has; NaN stays."""
    if kind != "bf16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16 if kind == "fp16" else np.float32)
    word = x.view(np.uint32)
    bits = (word + np.uint32(0x7FFF) + (word >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), word >> np.uint32(16) | np.uint32(0x40), bits).astype(np.uint16)


def _bucket(call: Call) -> None:
    into, kind = call.constant("INTO") == 1, call.kind("bucket")
    for address, start, count, code in call.array("table", 0, 4 * call.programs).reshape(-1, 4).tolist():
        own = _KINDS[code % 3]
        dtype = np.dtype({"fp32": "<f4", "bf16": "<u2", "fp16": "<f2"}[own])
        tensor = call.view(address, count * dtype.itemsize).view(dtype)
        place = call.array("bucket", start, count)
        source, target = (tensor, place) if into else (place, tensor)
        with np.errstate(all="ignore"):
            scaled = widened(source, own if into else kind) * call.real("scale")
        target[:] = _rounded(scaled, kind if into else own)


TWINS: Mapping[str, Twin] = MappingProxyType(
    {"encode": _encode, "reencode": _reencode, "decode": _decode, "withdraw": _withdraw, "bucket": _bucket}
)
