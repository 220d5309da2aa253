"""Memory that checks every access: regions with bytes, what is initialised, and who touched them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.ptx.errors import AccessError, Reason
from tests.ptx.races import Shadow, Stamps
from tests.ptx.types import Array, Bools

__all__ = ["Memory", "Offsets", "Region"]

Offsets = npt.NDArray[np.int64]
SECTOR = 32  # bytes that device memory moves at least
_LARGEST = (
    32  # bytes of the widest access: regions are padded to it, so that they can be seen as rows of any width
)
_BASE = 0x7F0000000000
_GUARD = 1 << 20  # bytes between two buffers: what is off by less than this hits nothing


class Region:
    """Bytes with their shadows. Offsets are (lanes,) int64, in range and aligned: callers have checked."""

    def __init__(
        self, data: npt.NDArray[np.uint8], initialised: npt.NDArray[np.uint8] | None, what: str
    ) -> None:
        padded = -(-max(data.size, 1) // _LARGEST) * _LARGEST
        self.data = np.zeros(padded, np.uint8)
        self.data[: data.size] = data
        self.initialised: npt.NDArray[np.uint8] | None = None
        if initialised is not None:
            self.initialised = np.zeros(padded, np.uint8)
            self.initialised[: data.size] = initialised
        self.what = what
        self.shadow: Shadow | None = None
        self.touched: npt.NDArray[np.bool_] | None = None
        """Of each 32 bytes, whether they were read and whether they were written, (2, sectors); None: not recorded."""

    def _rows(self, data: npt.NDArray[np.uint8], width: int) -> Array:
        """``data`` as rows of ``width`` bytes, each one number where there is such a type."""
        if width <= 8:
            return data.view(f"u{width}")
        return data.view(np.uint64).reshape(-1, width // 8)

    def load(self, offsets: Offsets, width: int, stamps: Stamps) -> Array:
        """The bytes, (lanes, width) uint8.

        Raises:
            AccessError: uninitialised, or a race.
        """
        at = offsets // width
        if self.initialised is not None:
            self._refuse_uninitialised(at, width)
        if self.touched is not None:  # what this launch wrote is in the cache
            sectors = offsets // SECTOR
            self.touched[0, sectors] |= ~self.touched[1, sectors]
        if self.shadow is not None:
            self.shadow.read(offsets, width, stamps)
        return np.ascontiguousarray(self._rows(self.data, width)[at]).view(np.uint8).reshape(-1, width)

    def _refuse_uninitialised(self, at: Offsets, width: int) -> None:
        assert self.initialised is not None
        seen = self._rows(self.initialised, width)[at]
        wrong = seen != np.array(-1, np.int64).astype(seen.dtype)
        if wrong.any():
            wrong = wrong.reshape(len(at), -1).any(axis=1)
            position = int(wrong.argmax())
            raise AccessError(
                Reason.UNINITIALISED, f"{self.what}, byte {int(at[position]) * width}", position
            )

    def store(self, offsets: Offsets, rows: npt.NDArray[np.uint8], stamps: Stamps) -> None:
        """Write (lanes, width) bytes.

        Raises:
            AccessError: a race.
        """
        width = rows.shape[1]
        at, values = offsets // width, self._rows(np.ascontiguousarray(rows).reshape(-1), width)
        data = self._rows(self.data, width)
        data[at] = values
        if self.touched is not None:
            self.touched[1, offsets // SECTOR] = True
        if self.initialised is not None:
            self._rows(self.initialised, width)[at] = np.array(-1, np.int64).astype(data.dtype)
        if self.shadow is not None:
            back = data[at]
            same: Bools | None = None
            if not np.array_equal(back, values):
                same = (back == values).reshape(len(at), -1).all(axis=1)
            self.shadow.write(offsets, width, stamps, same)

    def atomic(self, offsets: Offsets, width: int, stamps: Stamps) -> Array:
        """The words there, to be changed in place by the caller at ``offsets // width``."""
        if self.initialised is not None:
            self._refuse_uninitialised(offsets // width, width)
        if self.touched is not None:
            self.touched[:, offsets // SECTOR] = True
        if self.shadow is not None:
            self.shadow.atomic(offsets, width, stamps)
        return self._rows(self.data, width)


class _Buffer(Region):
    def __init__(self, address: int, data: Any, initialised: Any, name: str) -> None:
        super().__init__(data, initialised, name)
        self.address = address
        self.nbytes = data.size


class Memory:
    """Global memory: buffers far apart from each other, each checked for itself."""

    def __init__(self) -> None:
        self._buffers: list[_Buffer] = []
        self._next = _BASE

    def place(self, values: npt.ArrayLike, *, name: str = "", initialised: npt.ArrayLike = True) -> int:
        """A copy of ``values`` in a buffer of its own, aligned to 256 bytes; returns its address.

        ``initialised``: whether it may be read before it is written, one for all or for each byte.
        """
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        shadow = None
        if not np.all(initialised):
            shadow = np.where(np.broadcast_to(np.asarray(initialised, np.bool_), data.shape), 255, 0).astype(
                np.uint8
            )
        buffer = _Buffer(self._next, data, shadow, name or f"buffer {len(self._buffers)}")
        self._buffers.append(buffer)
        self._next = -(-(self._next + data.size + _GUARD) // 256) * 256
        return buffer.address

    def reserve(self, nbytes: int, *, name: str = "", fill: int = 0xA5) -> int:
        """A buffer that must be written before it is read; returns its address. It holds ``fill``, so that the
        host sees what nobody wrote."""
        return self.place(np.full(nbytes, fill, np.uint8), name=name, initialised=False)

    def _at(self, address: int) -> _Buffer:
        return next(buffer for buffer in self._buffers if buffer.address == address)

    def read(self, address: int, dtype: npt.DTypeLike = np.uint8) -> Array:
        """A copy of the buffer at ``address``."""
        buffer = self._at(address)
        return buffer.data[: buffer.nbytes].view(dtype).copy()

    def written(self, address: int) -> Bools:
        """For each byte, whether it is initialised."""
        buffer = self._at(address)
        if buffer.initialised is None:
            return np.ones(buffer.nbytes, np.bool_)
        return buffer.initialised[: buffer.nbytes] != 0

    def begin(self) -> None:
        """A launch begins: all that happened before is ordered before it."""
        for buffer in self._buffers:
            buffer.shadow = Shadow(buffer.data.size, Reason.GLOBAL_RACE)
            buffer.touched = np.zeros((2, buffer.data.size // SECTOR), np.bool_)

    def moved(self) -> int:
        """Bytes between device memory and a cache that forgets nothing during a launch, since it began: every 32
        bytes that were read, unless written before, and every 32 that were written, once."""
        return SECTOR * sum(
            int(np.count_nonzero(buffer.touched)) for buffer in self._buffers if buffer.touched is not None
        )

    def locate(self, addresses: npt.NDArray[np.uint64], width: int) -> Iterator[tuple[Region, Any, Offsets]]:
        """Buffers that are touched: region, which lanes (a slice or indices), their offsets.

        Raises:
            AccessError: misaligned, or not inside one buffer.
        """
        off = addresses % np.uint64(width) != 0
        if off.any():
            where = int(off.argmax())
            raise AccessError(Reason.MISALIGNED, f"{width} bytes at {int(addresses[where]):#x}", where)
        starts = np.array([buffer.address for buffer in self._buffers], np.uint64)
        low, high = int(addresses.min()), int(addresses.max())
        first = int(np.searchsorted(starts, low, side="right")) - 1
        buffer = self._buffers[max(first, 0)] if self._buffers else None
        if buffer and low >= buffer.address and high + width <= buffer.address + buffer.nbytes:
            yield buffer, slice(None), (addresses - np.uint64(buffer.address)).astype(np.int64)
            return
        which = np.searchsorted(starts, addresses, side="right") - 1
        ends = np.array([buffer.address + buffer.nbytes for buffer in self._buffers] + [0], np.uint64)
        outside = addresses + np.uint64(width) > ends[which]
        if outside.any():
            where = int(outside.argmax())
            raise AccessError(Reason.OUT_OF_BOUNDS, self._describe(int(addresses[where]), width), where)
        for number in np.unique(which):
            lanes = np.flatnonzero(which == number)
            start = np.uint64(self._buffers[number].address)
            yield self._buffers[number], lanes, (addresses[lanes] - start).astype(np.int64)

    def _describe(self, address: int, width: int) -> str:
        if not self._buffers:
            return f"{width} bytes at {address:#x}, there are no buffers"
        near = min(self._buffers, key=lambda buffer: abs(address - buffer.address - buffer.nbytes // 2))
        return f"{width} bytes at byte {address - near.address} of {near.what}, which has {near.nbytes}"
