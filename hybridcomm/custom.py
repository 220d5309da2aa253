"""Steps 4 and 6 of 7 in Python: compressors of a caller's own, the slow path.

In: arrays in the engine's memory. Out: a payload's body, or the sum of several. The engine calls them from its
executor, on the caller's thread or on the progress thread, and each call holds the GIL: backward stands still
meanwhile. The header around the body (plan digest, checksum, non-finite flag) is done here.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcomm.errors import CompressorError, PayloadError
from hybridcomm.kernels import reference
from hybridcomm.kernels.payload import FLAG_NONFINITE, HEADER_DTYPE, HEADER_NBYTES, Codec, align

__all__ = ["CustomCompressor", "CustomSpec"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Memory = memoryview | npt.NDArray[Any]

_TEXT = re.compile(r"[\w.:+/=-]+")
_QUIET_NAN = np.uint32(0x7FC00000).view(np.float32)


class CustomCompressor(abc.ABC):
    """A compressor written in Python: pass an instance as ``compress=``. It must be stateless and deterministic.

    Each call holds the GIL, on the caller's thread or on the engine's progress thread. Arrays are views of the
    engine's memory: do not keep them. An exception ends the collective with `CompressorError` on every rank.
    Ranks whose ``text`` differs are refused, so it names the algorithm and all its settings. Check an own one with
    `hybridcomm.testing.check_compressor`.
    """

    text: str
    """Letters, digits and ``._:+/=-``."""

    block: int = 16
    """Elements; shards and chunks begin on multiples of it."""

    contraction: float | None = None
    """d in |x - C(x)|^2 <= (1 - d) |x|^2 for any x; None: no promise. Error feedback converges where d > 0."""

    @abc.abstractmethod
    def nbytes(self, numel: int) -> int:
        """Bytes of the body for ``numel`` elements: a pure function, whatever the elements are."""

    @abc.abstractmethod
    def encode(self, grad: Floats, e_in: Floats, e_out: Floats, payload: Bytes) -> None:
        """Writes ``grad + e_in`` to ``payload`` (nbytes(numel) bytes, zero at first), what is not sent to ``e_out``.

        All finite, fp32, 1-D, apart from each other; ``grad`` and ``e_in`` are only read. With the sent part
        decoded, ``grad + e_in == decoded + e_out`` up to one rounding. Memoryless calls give zeros as ``e_in``.
        """

    @abc.abstractmethod
    def decode_add(self, payloads: Sequence[Bytes], out: Floats, weight: float) -> None:
        """Adds ``weight`` times each payload to ``out``, in list order, so that all ranks get the same bits."""

    def __str__(self) -> str:
        return f"custom:{self.text}"


@dataclass(frozen=True)
class CustomSpec:
    """A `CustomCompressor` as the engine and plans see it; two are equal where the compressors are."""

    compressor: CustomCompressor

    codec = Codec.CUSTOM
    whole_region = False
    seeded = False
    unbiased = False
    summable = False

    def __post_init__(self) -> None:
        own, text = self.compressor, getattr(self.compressor, "text", None)
        if not isinstance(text, str) or not _TEXT.fullmatch(text):
            raise CompressorError(f"{type(own).__name__}.text={text!r}: use letters, digits and ._:+/=-")
        if not isinstance(own.block, int) or own.block < 1:
            raise CompressorError(f"{own}: block={own.block!r} must be a number of elements >= 1")
        if own.contraction is not None and not 0 < own.contraction <= 1:
            raise CompressorError(f"{own}: contraction={own.contraction}: in (0, 1], or None")

    @property
    def params(self) -> tuple[int, int, int, int, int]:
        return Codec.CUSTOM, 0, 0, self.block, 0

    @property
    def block(self) -> int:
        return self.compressor.block

    @property
    def contraction(self) -> float | None:
        return self.compressor.contraction

    def nbytes(self, numel: int) -> int:
        """Header and padding included."""
        return HEADER_NBYTES + align(self._body_nbytes(numel))

    def _body_nbytes(self, numel: int) -> int:
        size = self.compressor.nbytes(numel)
        if not isinstance(size, (int, np.integer)) or size < 0:
            raise CompressorError(f"{self}: nbytes({numel}) is {size!r}: must be a number of bytes >= 0")
        return int(size)

    def __str__(self) -> str:
        return str(self.compressor)

    def encode_payload(
        self,
        grad: Memory,
        e_in: Memory | None,
        e_out: Memory | None,
        payload: Memory,
        digest: int,
        decay: float = 1.0,
    ) -> int:
        """``kernels.reference.encode`` on buffers; returns the flags."""
        source, whole = np.frombuffer(grad, np.float32), np.frombuffer(payload, np.uint8)
        # A copy: e_out may be e_in itself, which authors should not have to think of.
        before = np.zeros_like(source) if e_in is None else np.frombuffer(e_in, np.float32).copy()
        after = np.empty_like(source) if e_out is None else np.frombuffer(e_out, np.float32)
        own = before if decay == 1.0 else np.float32(decay) * before
        with np.errstate(all="ignore"):
            flags = 0 if np.isfinite(source + own).all() else FLAG_NONFINITE
        whole[:] = 0
        if flags:
            after[:] = before
        else:
            body = whole[HEADER_NBYTES : HEADER_NBYTES + self._body_nbytes(source.size)]
            self.compressor.encode(source, own, after, body)
        whole[:HEADER_NBYTES] = self._header(whole, source.size, digest, flags)
        return flags

    def decode_payloads(self, payloads: Sequence[Memory], out: Memory, weight: float, digest: int) -> None:
        """``kernels.reference.decode_add`` into zeros, on buffers; raises `PayloadError` before it writes."""
        target = np.frombuffer(out, np.float32)
        arrays = [np.frombuffer(payload, np.uint8) for payload in payloads]
        flags = 0
        for position, array in enumerate(arrays):
            own = int(array[:HEADER_NBYTES].view(HEADER_DTYPE)["flags"][0]) & FLAG_NONFINITE
            if not np.array_equal(array[:HEADER_NBYTES], self._header(array, target.size, digest, own)):
                raise PayloadError(f"payload {position} is not what {self} and the plan say, or was damaged")
            flags |= own
        if flags:
            target[:] = _QUIET_NAN
            return
        size = self._body_nbytes(target.size)
        target[:] = 0
        bodies = [array[HEADER_NBYTES : HEADER_NBYTES + size] for array in arrays]
        self.compressor.decode_add(bodies, target, weight)

    def _header(self, payload: Bytes, numel: int, digest: int, flags: int) -> Bytes:
        head = reference.header(self, numel, digest=digest, flags=flags)
        fields: Any = head.view(HEADER_DTYPE)
        sealed = np.concatenate([head, payload[HEADER_NBYTES:]])
        fields["checksum"] = reference.checksum(sealed)
        return head
