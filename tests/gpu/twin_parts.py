"""What twins share: types of 16 bits, a payload's flags and checksum, and what nobody may rely on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.gpu.calls import Array, Call

__all__ = ["add_checksum", "any_flag", "flags", "narrowed", "poison", "put_checksum", "widened"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_U64 = (1 << 64) - 1


def widened(values: Array, kind: str) -> Floats:
    """To fp32, exact; bf16 comes as its bits, and fp32 as it lies in memory."""
    if kind == "bf16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def narrowed(values: Floats, kind: str) -> Array:
    """A residual in its type: half to even, nothing finite made infinite."""
    if kind == "fp32":
        return values
    bits = values.view(np.uint32)
    size = bits & np.uint32(0x7FFFFFFF)
    size += np.uint32(0x7FFF) + (size >> np.uint32(16) & np.uint32(1))
    size >>= np.uint32(16)
    np.minimum(size, np.uint32(0x7F7F), out=size)
    return (size | (bits >> np.uint32(16) & np.uint32(0x8000))).astype(np.uint16)


def flags(head: Bytes) -> npt.NDArray[np.uint32]:
    """The header's flags, in place."""
    return head[40:44].view("<u4")


def any_flag(call: Call, name: str, count: int, stride: int) -> bool:
    """Whether one of ``count`` payloads is flagged; looks at their flags alone."""
    return any(call.bytes(name, w * stride + 40, 4).view("<u4")[0] for w in range(count))


def put_checksum(head: Bytes, value: int) -> None:
    head[48:56].view("<u8")[0] = value & _U64


def add_checksum(head: Bytes, part: Bytes, at: int) -> None:
    """Adds the share of bytes that stand from byte ``at`` on of the payload."""
    before = at % 4
    if before or part.size % 4:
        padded = np.zeros(-(-(before + part.size) // 4) * 4, np.uint8)
        padded[before : before + part.size] = part
        part = padded
    words = part.view("<u4")
    factors = (np.arange(words.size, dtype=np.uint64) + np.uint64(at // 4)) * np.uint64(2) + np.uint64(1)
    factors &= np.uint64(0xFFFFFFFF)
    total = int((words * factors).sum(dtype=np.uint64))
    put_checksum(head, int(head[48:56].view("<u8")[0]) + total)


def poison(values: npt.NDArray[Any]) -> None:
    """Bytes that no encoder writes; NaN as floats."""
    values.view(np.uint8)[:] = 0xFF
