"""Who touched which bytes since when, and whether two touches were ordered by a barrier.

A stamp is who and when, in 64 bits:

    [ CTA + 1: 20 | barriers of the CTA: 20 | of the warp since: 12 | warp: 6 | lane: 6 ]

Two touches by different threads are ordered when a barrier of their CTA stands between them, or one of their
warp if they share it. Per granule it is enough to keep the last write, the reads since, and the atomics since: a
field of all ones stands for several. Source: the idea of FastTrack (Flanagan and Freund, PLDI 2009), where barriers
are the only synchronisation.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tests.ptx.errors import AccessError, Reason
from tests.ptx.types import Bools

__all__ = ["CTA_SHIFT", "EPOCH_SHIFT", "WARP_EPOCH_SHIFT", "WARP_SHIFT", "Shadow", "Stamps"]

Stamps = npt.NDArray[np.uint64]

WARP_SHIFT, WARP_EPOCH_SHIFT, EPOCH_SHIFT, CTA_SHIFT = 6, 12, 24, 44
_LANE = np.uint64((1 << WARP_SHIFT) - 1)
_WARP = np.uint64((1 << WARP_EPOCH_SHIFT) - (1 << WARP_SHIFT))
_WARP_EPOCH = np.uint64((1 << EPOCH_SHIFT) - (1 << WARP_EPOCH_SHIFT))
_IN_CTA = np.uint64((1 << EPOCH_SHIFT) - 1)
_EPOCH = np.uint64((1 << CTA_SHIFT) - (1 << EPOCH_SHIFT))
_OTHER_CTA = np.uint64(1 << CTA_SHIFT)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_ZERO = np.uint64(0)
WIDEST = 16  # granules begin this wide and narrow down to the narrowest access


def unordered(old: Stamps, now: Stamps) -> Bools:
    """Whether ``old`` is by another thread and no barrier stands between."""
    x = old ^ now
    same_warp = (x & _WARP) == 0
    apart = ~same_warp | (((x & _WARP_EPOCH) == 0) & ((x & _LANE) != 0))
    return np.asarray((old != 0) & ((x >= _OTHER_CTA) | (((x & _EPOCH) == 0) & apart)))


def merged(old: Stamps, now: Stamps) -> Stamps:
    """One stamp for both touches, ``now`` the later one; idempotent, so that it may be repeated until stable."""
    x = old ^ now
    same_epoch = (x & _EPOCH) == 0
    other_warp = (x & _WARP) != 0
    lanes = same_epoch & ~other_warp & ((x & _WARP_EPOCH) == 0) & ((x & _LANE) != 0)
    more = np.where(same_epoch & other_warp, _IN_CTA, _ZERO) | np.where(lanes, _LANE, _ZERO)
    more = np.where(x >= _OTHER_CTA, _ALL, more)
    return np.asarray(now | np.where(old == 0, _ZERO, more))


def describe(stamp: int) -> str:
    """The other party of a race."""
    lane, warp, cta = stamp & 63, stamp >> WARP_SHIFT & 63, stamp >> CTA_SHIFT
    if cta == (1 << 20) - 1:
        return "several CTAs"
    if warp == 63:
        return f"several warps of CTA {cta - 1}"
    who = "several lanes" if lane == 63 else f"lane {lane}"
    return f"CTA {cta - 1}, warp {warp}, {who}"


class Shadow:
    """Stamps of a region of ``nbytes``; ``touch_*`` raise a AccessError at the first conflict.

    Offsets are (lanes,), multiples of the width; stamps (lanes,).
    """

    def __init__(self, nbytes: int, reason: Reason) -> None:
        self.reason = reason
        self.granule = WIDEST
        self.reads = np.zeros(-(-nbytes // WIDEST), np.uint64)
        self.writes: Stamps | None = None
        self.atomics: Stamps | None = None

    def _index(self, offsets: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int64]:
        """(lanes, granules of an access)."""
        if width < self.granule:
            factor = self.granule // width
            self.granule = width
            for name in ("reads", "writes", "atomics"):
                stamps = getattr(self, name)
                if stamps is not None:
                    setattr(self, name, np.repeat(stamps, factor))
        first = offsets // self.granule
        return first[:, None] + np.arange(width // self.granule) if width > self.granule else first[:, None]

    def _refuse(self, old: Stamps, now: Stamps, what: str) -> None:
        bad = unordered(old, now).any(axis=1)
        if bad.any():
            self._report(int(bad.argmax()), old, now, what)

    def _report(self, position: int, old: Stamps, now: Stamps, what: str) -> None:
        parties = old[position][unordered(old[position], now[position])]
        other = describe(int(parties[0])) if parties.size else "another thread in this instruction"
        raise AccessError(self.reason, f"{what} by {other}, no barrier between", position)

    @staticmethod
    def _merge_into(stamps: Stamps, index: npt.NDArray[np.int64], old: Stamps, now: Stamps) -> None:
        new = merged(old, now) if old.any() else np.broadcast_to(now, old.shape)
        stamps[index] = new
        seen = stamps[index]
        rising = seen != new  # where several lanes met in a granule, one of them won
        while rising.any():
            joined = merged(seen, np.broadcast_to(now, seen.shape))
            rising = joined != seen
            stamps[index[rising]] = joined[rising]
            seen = stamps[index]

    def read(self, offsets: npt.NDArray[np.int64], width: int, stamps: Stamps) -> None:
        index, now = self._index(offsets, width), stamps[:, None]
        for earlier, what in ((self.writes, "written"), (self.atomics, "changed by an atomic")):
            if earlier is not None:
                self._refuse(earlier[index], now, what)
        self._merge_into(self.reads, index, self.reads[index], now)

    def write(self, offsets: npt.NDArray[np.int64], width: int, stamps: Stamps, same: Bools | None) -> None:
        """``same``: lanes whose bytes are what the instruction left there, None for all."""
        index, now = self._index(offsets, width), stamps[:, None]
        if self.writes is None:
            self.writes = np.zeros_like(self.reads)
        self._refuse(self.writes[index], now, "written")
        self._refuse(self.reads[index], now, "read")
        self.reads[index] = 0
        if self.atomics is not None:
            self._refuse(self.atomics[index], now, "changed by an atomic")
            self.atomics[index] = 0
        self.writes[index] = now
        seen = self.writes[index]
        if np.array_equal(seen, np.broadcast_to(now, seen.shape)):
            return
        met = (seen != now).any(axis=1)
        wrong = met & ((seen ^ now) >= _OTHER_CTA).any(axis=1)
        wrong |= met & ~same if same is not None else False
        if wrong.any():
            self._report(int(wrong.argmax()), seen, now, "written")
        self._merge_into(self.writes, index, np.zeros_like(seen), now)

    def atomic(self, offsets: npt.NDArray[np.int64], width: int, stamps: Stamps) -> None:
        index, now = self._index(offsets, width), stamps[:, None]
        if self.atomics is None:
            self.atomics = np.zeros_like(self.reads)
        if self.writes is not None:
            self._refuse(self.writes[index], now, "written")
        self._refuse(self.reads[index], now, "read")
        self._merge_into(self.atomics, index, self.atomics[index], now)
