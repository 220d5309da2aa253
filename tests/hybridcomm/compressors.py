"""Compressors written in Python: good ones, and planted breaches of each rule of the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridcomm.custom import CustomCompressor

Array = np.ndarray[Any, Any]


class BlockSign(CustomCompressor):
    """One bit per element, and the mean magnitude of each block."""

    contraction = 1 / 64
    block = 64

    def __init__(self, name: str = "blocksign") -> None:
        self.text = f"{name}:{self.block}"

    def edges(self, numel: int) -> Array:
        return np.arange(0, numel, self.block)

    def nbytes(self, numel: int) -> int:
        return 4 * len(self.edges(numel)) + -(-numel // 8)

    def encode(self, grad: Array, e_in: Array, e_out: Array, payload: Array) -> None:
        acc, edges = grad + e_in, self.edges(grad.size)
        lengths = np.diff(np.append(edges, grad.size))
        scales = (np.add.reduceat(np.abs(acc, dtype=np.float64), edges) / lengths).astype(np.float32)
        payload[: scales.nbytes] = scales.view(np.uint8)
        payload[scales.nbytes :] = np.packbits(acc < 0)
        e_out[:] = acc - self.values(payload, grad.size)

    def values(self, payload: Array, numel: int) -> Array:
        count = len(self.edges(numel))
        negative = np.unpackbits(payload[4 * count :], count=numel).astype(bool)
        scales = np.repeat(payload[: 4 * count].copy().view(np.float32), self.block)[:numel]
        return np.where(negative, -scales, scales)

    def decode_add(self, payloads: Sequence[Array], out: Array, weight: float) -> None:
        for payload in payloads:
            out += np.float32(weight) * self.values(payload, out.size)


class Half(CustomCompressor):
    """float16, clipped to its range: tiny elements stay in the residual."""

    text = "half"

    def nbytes(self, numel: int) -> int:
        return 2 * numel

    def encode(self, grad: Array, e_in: Array, e_out: Array, payload: Array) -> None:
        acc = grad + e_in
        sent = np.clip(acc, -65504, 65504).astype(np.float16)
        payload.view(np.float16)[:] = sent
        e_out[:] = acc - sent.astype(np.float32)

    def decode_add(self, payloads: Sequence[Array], out: Array, weight: float) -> None:
        for payload in payloads:
            out += np.float32(weight) * payload.view(np.float16).astype(np.float32)


class KeepsAResidual(BlockSign):
    """Has state."""

    left: Array | None = None

    def encode(self, grad: Array, e_in: Array, e_out: Array, payload: Array) -> None:
        if self.left is not None and self.left.size == grad.size:
            grad = grad + self.left
        super().encode(grad, e_in, e_out, payload)
        self.left = e_out.copy()


class Random(BlockSign):
    """Draws from the global generator."""

    def encode(self, grad: Array, e_in: Array, e_out: Array, payload: Array) -> None:
        grad = grad + np.random.standard_normal(grad.size).astype(np.float32)
        super().encode(grad, e_in, e_out, payload)


class GrowingPayloads(BlockSign):
    """A size that depends on more than numel."""

    calls = 0

    def encode(self, grad: Array, e_in: Array, e_out: Array, payload: Array) -> None:
        self.calls += 1
        super().encode(grad, e_in, e_out, payload[: super().nbytes(grad.size)])

    def nbytes(self, numel: int) -> int:
        return super().nbytes(numel) + self.calls


class DropsTheRest(BlockSign):
    """Leaves nothing."""

    def encode(self, grad: Array, e_in: Array, e_out: Array, payload: Array) -> None:
        super().encode(grad, e_in, e_out, payload)
        e_out[:] = 0


class ForgetsResidual(BlockSign):
    """Does not add e_in."""

    def encode(self, grad: Array, e_in: Array, e_out: Array, payload: Array) -> None:
        super().encode(grad, np.zeros_like(e_in), e_out, payload)


class SendsNothing(BlockSign):
    """Keeps all, for ever."""

    contraction = None  # type: ignore[assignment]

    def encode(self, grad: Array, e_in: Array, e_out: Array, payload: Array) -> None:
        payload[:] = 0
        e_out[:] = grad + e_in


class Overclaims(BlockSign):
    contraction = 0.5


class AddsInReverse(BlockSign):
    def decode_add(self, payloads: Sequence[Array], out: Array, weight: float) -> None:
        super().decode_add(payloads[::-1], out, weight)


class Overwrites(BlockSign):
    def decode_add(self, payloads: Sequence[Array], out: Array, weight: float) -> None:
        out[:] = 0
        super().decode_add(payloads, out, weight)


class IgnoresWeight(BlockSign):
    def decode_add(self, payloads: Sequence[Array], out: Array, weight: float) -> None:
        super().decode_add(payloads, out, 1.0)


class ChangesGradient(BlockSign):
    def encode(self, grad: Array, e_in: Array, e_out: Array, payload: Array) -> None:
        super().encode(grad, e_in, e_out, payload)
        grad += e_in


class ForgetsTheTail(BlockSign):
    """Leaves the last, shorter block of e_out unwritten."""

    def encode(self, grad: Array, e_in: Array, e_out: Array, payload: Array) -> None:
        rest = e_out.copy()
        super().encode(grad, e_in, rest, payload)
        whole = grad.size // self.block * self.block
        e_out[:whole] = rest[:whole]


class DividesByZero(BlockSign):
    """Not a number where a block is zero."""

    def encode(self, grad: Array, e_in: Array, e_out: Array, payload: Array) -> None:
        super().encode(grad, e_in, e_out, payload)
        largest = np.abs(grad + e_in).max()
        with np.errstate(all="ignore"):
            e_out *= largest / largest


class SendsByItself(BlockSign):
    """What a receiver needs stays in the object."""

    def encode(self, grad: Array, e_in: Array, e_out: Array, payload: Array) -> None:
        super().encode(grad, e_in, e_out, payload)
        self.kept = payload.copy()
        payload[:] = 0

    def values(self, payload: Array, numel: int) -> Array:
        kept = getattr(self, "kept", None)
        return super().values(payload if kept is None or kept.size != payload.size else kept, numel)


class Raises(BlockSign):
    def decode_add(self, payloads: Sequence[Array], out: Array, weight: float) -> None:
        raise KeyError("no such table")


class HasNoText(BlockSign):
    def __init__(self) -> None:
        self.text = "two words"


GOOD = (BlockSign, Half)
BROKEN = {
    KeepsAResidual: "deterministic",
    Random: "deterministic",
    GrowingPayloads: "sizes",
    DropsTheRest: "conserves",
    ForgetsResidual: "conserves",
    SendsNothing: "contracts",
    Overclaims: "contracts",
    AddsInReverse: "adds",
    Overwrites: "adds",
    IgnoresWeight: "adds",
    ChangesGradient: "writes",
    ForgetsTheTail: "writes",
    DividesByZero: "conserves",
    SendsByItself: "deterministic",
    Raises: "adds",
    HasNoText: "settings",
}
"""Each breach, and the check that must find it."""
