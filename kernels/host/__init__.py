"""Steps 4 and 6 of 7 on the host: the C++ kernels behind the oracle's interface, on numpy arrays.

In: a shard of gradients with its residual, or payloads; out: a payload and the new residual, or the shard.
Same arguments and same bytes as ``hybridcomm.kernels.reference``, plus ``isa`` to pin an instruction set.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hybridcomm.kernels import _host
from hybridcomm.kernels.spec import PayloadFormatError, Spec, Status

__all__ = ["active_isa", "available_isas", "decode", "decode_add", "encode", "nbytes", "set_isa"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def available_isas() -> list[str]:
    """Instruction sets this machine can run, slowest first: of ``scalar``, ``avx2``, ``avx512``."""
    return _host.available_isas()


def active_isa() -> str:
    """What runs when no ``isa`` is given."""
    return _host.active_isa()


def set_isa(isa: str | None) -> None:
    """Pin an instruction set in the whole process; ``None`` goes back to the fastest.

    Raises:
        ValueError: unknown, or not on this machine.
    """
    _host.set_isa(isa)


def nbytes(spec: Spec, numel: int) -> int:
    """The C++ side's ``spec.nbytes(numel)``."""
    return _host.nbytes(spec.params, numel)


def encode(
    spec: Spec,
    grad: Floats,
    e_in: Floats | None,
    e_out: Floats | None,
    payload: Bytes,
    digest: int = 0,
    *,
    decay: float = 1.0,
    seed: int = 0,
    isa: str | None = None,
) -> int:
    """``reference.encode``, fast. Arrays are contiguous fp32 / u8 and do not overlap, but e_out may be e_in.

    Raises:
        ValueError: a length, an overlap or an instruction set that cannot be used.
        TypeError: another dtype, or not contiguous.
    """
    return _host.encode(spec.params, grad, e_in, e_out, payload, digest, decay, seed, isa)


def decode_add(
    spec: Spec,
    payloads: Sequence[Bytes],
    out: Floats,
    weight: float = 1.0,
    digest: int = 0,
    *,
    isa: str | None = None,
) -> int:
    """``reference.decode_add``, fast.

    Raises:
        PayloadFormatError: a payload is not what spec, size and digest say; ``out`` is then untouched.
    """
    return _decode(spec, payloads, out, weight, digest, clear=False, isa=isa)


def decode(
    spec: Spec,
    payloads: Sequence[Bytes],
    out: Floats,
    weight: float = 1.0,
    digest: int = 0,
    *,
    isa: str | None = None,
) -> int:
    """``decode_add`` into zeros: clears and adds block by block, so ``out`` passes through the caches once.

    Raises:
        PayloadFormatError: as ``decode_add``.
    """
    return _decode(spec, payloads, out, weight, digest, clear=True, isa=isa)


def _decode(
    spec: Spec,
    payloads: Sequence[Bytes],
    out: Floats,
    weight: float,
    digest: int,
    *,
    clear: bool,
    isa: str | None,
) -> int:
    status, value = _host.decode(spec.params, list(payloads), out, weight, digest, clear, isa)
    if status != Status.OK:
        raise PayloadFormatError(Status(status), value)
    return value
