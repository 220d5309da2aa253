"""`device_access.ranges` of powersgd's passes: which parts of a payload, of acc and of the residuals each has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hybridcomm.kernels.payload import HEADER_NBYTES
from hybridcomm.kernels.spec import parse

if TYPE_CHECKING:
    from hybridcomm.kernels.device_access import Launch

__all__ = ["POWERSGD"]

_FLAGS, _CHECKSUM, _SEED = (40, 4), (48, 8), (56, 8)  # first byte and length in a payload's header
_ACROSS = 32  # columns of a program of right


def _encode(launch: Launch) -> None:
    last = launch.reach(launch.number("numel"))
    if launch.has("grad"):
        launch.elements("grad", 0, last)
    launch.elements("e_in", 0, last)
    launch.elements("acc", 0, last, write=True)
    launch.touch("payload", *_FLAGS, write=True)


def _payloads(launch: Launch) -> None:
    spec, numel = parse(launch.kernel.codec), launch.number("numel")
    for w in range(launch.number("count")):
        launch.touch("payloads", w * launch.number("stride"), spec.nbytes(numel))


def _reencode(launch: Launch) -> None:
    _payloads(launch)
    _encode(launch)


def _left(launch: Launch) -> None:
    spec: Any = parse(launch.kernel.codec)
    numel = launch.number("numel")
    last, rows = launch.reach(numel), spec.rows(numel)
    launch.elements("acc", 0, last)
    launch.touch("payload", *_FLAGS)
    launch.touch("payload", *_SEED)
    for c in range(spec.rank):
        launch.touch("payload", spec.offsets(numel)[0] + 4 * c * rows, 4 * spec.rows(last), write=True)


def _orthonormal(launch: Launch) -> None:
    """P, the scale before it, and the zeros behind it."""
    spec: Any = parse(launch.kernel.codec)
    behind = spec.offsets(launch.number("numel"))[1]
    launch.touch("payload", *_FLAGS, write=True)
    launch.touch("payload", *_CHECKSUM, write=True)
    launch.touch("payload", HEADER_NBYTES, behind - HEADER_NBYTES, write=True)


def _right(launch: Launch) -> None:
    spec: Any = parse(launch.kernel.codec)
    numel = launch.number("numel")
    columns = spec.block if launch.programs is None else min(spec.block, _ACROSS * launch.programs)
    begin = spec.offsets(numel)[1]
    launch.elements("acc", 0, numel)
    launch.touch("payload", HEADER_NBYTES, begin - HEADER_NBYTES)
    launch.touch("payload", *_CHECKSUM, write=True)
    for c in range(spec.rank):
        launch.touch("payload", begin + 4 * c * spec.block, 4 * columns, write=True)


def _rest(launch: Launch) -> None:
    numel = launch.number("numel")
    last = launch.reach(numel)
    launch.elements("acc", 0, last)
    launch.elements("e_in", 0, last)
    launch.elements("e_out", 0, last, write=True)
    launch.touch("payload", *_FLAGS)
    launch.touch("payload", *_CHECKSUM, write=True)
    launch.touch("payload", HEADER_NBYTES, parse(launch.kernel.codec).nbytes(numel) - HEADER_NBYTES)


def _decode(launch: Launch) -> None:
    _payloads(launch)
    launch.elements("out", 0, launch.reach(launch.number("numel")), write=True)


POWERSGD: Mapping[str, Callable[[Launch], None]] = MappingProxyType(
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
"""By the name of the pass, which stands behind the rank in a kernel's."""
