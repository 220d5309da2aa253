"""Twins of powersgd's passes by the oracle's phases, each with what the next one relies on: acc, flags, P, Q."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcomm.kernels import HEADER_NBYTES, parse
from hybridcomm.kernels.oracles import powersgd as oracle
from hybridcomm.kernels.oracles.bits import INF_KEY, QUIET_NAN, keys, power
from tests.gpu.calls import Call
from tests.gpu.twin_parts import add_checksum, any_flag, flags, narrowed, put_checksum, widened

__all__ = ["TWINS"]

Floats = npt.NDArray[np.float32]
_ACROSS = 32  # columns of a program of right


def _exponent(largest: int) -> int:
    """The scale's, biased; zero where nothing is sent."""
    exponent = max(largest >> 23, 1)
    return 0 if exponent > oracle.MAX_SCALE else exponent


def _scale(exponent: int) -> Floats:
    return power(np.array(exponent))


def _matrix(call: Call, spec: Any, numel: int, exponent: int) -> Floats:
    """acc over its scale, as rows."""
    padded = np.zeros((spec.rows(numel), spec.block), np.float32)
    padded.reshape(-1)[:numel] = call.array("acc", 0, numel)
    scaled: Floats = padded * _scale(254 - exponent)
    return scaled


def _leave(call: Call, acc: Floats) -> None:
    """Ends the first pass: flags hold the largest magnitude meanwhile."""
    if call.values["e_in"]:
        e_in = widened(call.array("e_in", 0, acc.size), call.kind("e_in"))
        with np.errstate(all="ignore"):
            acc = acc + call.real("decay") * e_in
    call.array("acc", 0, acc.size)[:] = acc
    held = flags(call.bytes("payload", 0, HEADER_NBYTES))
    held[0] = max(int(held[0]), int(keys(acc).max(initial=0)))


def _encode(call: Call) -> None:
    _leave(call, widened(call.array("grad", 0, call.reach()), call.kind("grad")))


def _add(call: Call, out: Floats) -> None:
    """Adds all payloads to the programs' part of the region; NaN where one of them is flagged."""
    spec: Any = parse(call.kernel.codec)
    count, stride, numel = call.number("count"), call.number("stride"), call.number("numel")
    if any_flag(call, "payloads", count, stride):
        out[:] = QUIET_NAN
        return
    whole = np.zeros(numel, np.float32)
    whole[: out.size] = out
    with np.errstate(all="ignore"):
        for w in range(count):
            payload = call.bytes("payloads", w * stride, spec.nbytes(numel))
            oracle.add(spec, payload, whole, call.real("weight"))
    out[:] = whole[: out.size]


def _reencode(call: Call) -> None:
    total = np.zeros(call.reach(), np.float32)
    _add(call, total)
    _leave(call, total)


def _left(call: Call) -> None:
    spec: Any = parse(call.kernel.codec)
    numel, last = call.number("numel"), call.reach()
    head, rows = call.bytes("payload", 0, HEADER_NBYTES), spec.rows(numel)
    exponent = _exponent(int(flags(head)[0]))
    signs = oracle.start(spec, int(head[56:64].view("<u8")[0]))
    for c, column in enumerate(signs):
        p = call.bytes("payload", spec.offsets(numel)[0] + 4 * c * rows, 4 * spec.rows(last)).view("<f4")
        p[:] = oracle.dot(_matrix(call, spec, last, exponent), column) if exponent else 0


def _orthonormal(call: Call) -> None:
    spec: Any = parse(call.kernel.codec)
    numel = call.number("numel")
    begin, behind, _ = spec.offsets(numel)
    head = call.bytes("payload", 0, HEADER_NBYTES)
    largest, part = int(flags(head)[0]), call.bytes("payload", HEADER_NBYTES, behind - HEADER_NBYTES)
    exponent, end = _exponent(largest), begin + 4 * spec.rank * spec.rows(numel) - HEADER_NBYTES
    flags(head)[0] = largest >= INF_KEY
    part[: begin - HEADER_NBYTES] = 0
    part[0] = exponent
    part[end:] = 0
    if exponent:
        p = part[begin - HEADER_NBYTES : end].view("<f4").reshape(spec.rank, -1)
        p[:] = oracle.orthonormal(p.copy())
        add_checksum(head, part, HEADER_NBYTES)


def _right(call: Call) -> None:
    spec: Any = parse(call.kernel.codec)
    numel, columns = call.number("numel"), min(spec.block, _ACROSS * call.programs)
    head = call.bytes("payload", 0, HEADER_NBYTES)
    begin, behind, _ = spec.offsets(numel)
    exponent = int(call.bytes("payload", HEADER_NBYTES, 1)[0])
    right = np.zeros((spec.rank, columns), np.float32)
    if exponent:
        nbytes = 4 * spec.rank * spec.rows(numel)
        left = call.bytes("payload", begin, nbytes).view("<f4").reshape(spec.rank, -1)
        for i, row in enumerate(_matrix(call, spec, numel, exponent)):
            right = right + row[:columns] * left[:, i : i + 1]
    for c, values in enumerate(right):
        at = behind + 4 * c * spec.block
        call.bytes("payload", at, 4 * columns).view("<f4")[:] = values
        if exponent:
            add_checksum(head, values.view(np.uint8), at)


def _rest(call: Call) -> None:
    spec: Any = parse(call.kernel.codec)
    numel, last = call.number("numel"), call.reach()
    head, e_out = call.bytes("payload", 0, HEADER_NBYTES), call.array("e_out", 0, last)
    if flags(head)[0]:
        put_checksum(head, call.number("checksum"))
        e_out[:] = call.array("e_in", 0, last) if call.values["e_in"] else 0
        return
    scale, left, right = oracle.unpack(spec, call.bytes("payload", 0, spec.nbytes(numel)), numel)
    values = (oracle.product(left, right) * _scale(scale)).reshape(-1)[:last]
    e_out[:] = narrowed(call.array("acc", 0, last) - values, call.kind("e_out"))


def _decode(call: Call) -> None:
    out = call.array("out", 0, call.reach())
    if not call.kernel.function.endswith("_add"):
        out[:] = 0
    _add(call, out)


TWINS: Mapping[str, Callable[[Call], None]] = MappingProxyType(
    {
        "encode": _encode,
        "reencode": _reencode,
        "left": _left,
        "orthonormal": _orthonormal,
        "right": _right,
        "rest": _rest,
        "decode": _decode,
    }
)
