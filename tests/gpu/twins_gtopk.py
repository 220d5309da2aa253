"""Twins of gtopk's passes, each with the memory that the next one relies on: bins, what was found, counts, the kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcomm.kernels import HEADER_NBYTES, parse
from hybridcomm.kernels.oracles.bits import INF_KEY, QUIET_NAN, power, quantised
from hybridcomm.kernels.specs.gtopk import GROUP
from tests.gpu.calls import Call
from tests.gpu.twin_parts import add_checksum, any_flag, flags, narrowed, put_checksum, widened

__all__ = ["TWINS"]

Ints = npt.NDArray[np.int64]
_BINS, _LOW = 2048, 10
_WORDS = 1024  # of a payload's counts that a program of ones and add has
_HIGH, _LOWER = np.uint64(32), np.uint64(0xFFFFFFFF)


def _keys(call: Call) -> Ints:
    return call.array("acc", 0, call.reach()).view(np.int32) & np.int32(0x7FFFFFFF)


def _found(call: Call, name: str = "found") -> tuple[int, int]:
    """The key so far, and the wanted one's place among those that begin with it."""
    key, wanted = call.bytes(name, 0, 8).view("<u4").tolist()
    return key, wanted


def _first(call: Call) -> None:
    numel = call.reach()
    acc = widened(call.array("grad", 0, numel), call.kind("grad"))
    if call.values["e_in"]:
        with np.errstate(all="ignore"):
            acc = acc + call.real("decay") * widened(call.array("e_in", 0, numel), call.kind("e_in"))
    call.array("acc", 0, numel)[:] = acc
    keys = _keys(call)
    call.array("bins", 0, _BINS)[:] += np.bincount(keys >> 2 * _LOW, minlength=_BINS).astype(np.uint32)
    if numel and keys.max() >= INF_KEY:
        flags(call.bytes("payload", 0, HEADER_NBYTES))[0] |= 1


def _histogram(call: Call) -> None:
    bits = _keys(call) >> call.number("shift")
    low = bits[bits >> _LOW == _found(call)[0]] & ((1 << _LOW) - 1)
    call.array("bins", 0, 1 << _LOW)[:] += np.bincount(low, minlength=1 << _LOW).astype(np.uint32)


def _narrow(call: Call) -> None:
    bins = call.array("bins", 0, _BINS).astype(np.int64)[::-1]
    key, wanted = _found(call) if call.values["found"] else (0, call.number("kept"))
    up_to = np.cumsum(bins)
    hits = np.flatnonzero((up_to - bins < wanted) & (wanted <= up_to))
    if hits.size:
        place = int(hits[0])
        before = int(up_to[place] - bins[place])
        call.bytes("to", 0, 8).view("<u4")[:] = ((key << _LOW) | (_BINS - 1 - place), wanted - before)


def _count(call: Call) -> None:
    keys, key = _keys(call), _found(call)[0]
    starts = np.arange(0, keys.size, call.kernel.elements)
    above, equal = (np.add.reduceat(each.astype(np.uint64), starts) for each in (keys > key, keys == key))
    call.array("counts", 0, call.programs)[:] = 0
    call.array("counts", 0, starts.size)[:] = above << _HIGH | equal


def _scan(call: Call) -> None:
    counts = call.array("counts", 0, call.number("tiles"))
    counts[:] = np.cumsum(counts, dtype=np.uint64) - counts


def _collect(call: Call) -> None:
    acc, keys, (key, ties) = call.array("acc", 0, call.reach()), _keys(call), _found(call)
    places = np.flatnonzero(keys >= key)
    if not places.size:
        return
    larger = keys[places] > key
    tiles = places // call.kernel.elements
    starts = np.searchsorted(tiles, np.arange(tiles[-1] + 1))
    base = call.array("counts", 0, int(tiles[-1]) + 1)[tiles]

    def before(which: npt.NDArray[np.bool_]) -> Ints:
        """How many of the place's tile come before it."""
        up_to = np.concatenate([[0], np.cumsum(which)])
        return up_to[:-1] - up_to[starts[tiles]]

    above = before(larger) + (base >> _HIGH).astype(np.int64)
    equal = before(~larger) + (base & _LOWER).astype(np.int64)
    kept = larger | (equal < ties)
    records = (above + np.minimum(equal, ties))[kept]
    if not records.size:
        return
    most = int(records.max()) + 1
    call.array("values", 0, most)[records] = acc[places[kept]]
    call.array("indices", 0, most)[records] = places[kept]


def _pack(call: Call) -> None:
    spec: Any = parse(call.kernel.codec)
    block, _, value_bits = spec.topk.layout
    kept = min(call.number("kept"), call.programs * 32 * call.kernel.num_warps)
    head = call.bytes("payload", 0, HEADER_NBYTES)
    indices = call.array("indices", 0, kept).astype(np.int64)
    if (np.diff(indices) <= 0).any():
        raise ValueError(
            "indices that do not ascend: collect has not run, or something has written over them"
        )
    acc = np.zeros(-(-kept // GROUP) * GROUP, np.float32)
    acc[:kept] = call.array("values", 0, kept)
    with np.errstate(all="ignore"):
        acc[~np.isfinite(acc)] = 0.0  # a flagged payload's: withdraw clears them
        scales, codes, values = quantised(acc.reshape(-1, GROUP), value_bits)
        rest = call.array("rest", 0, int(indices[-1]) + 1)
        rest[indices] = acc[:kept] - values.reshape(-1)[:kept]
    records = (codes.reshape(-1)[:kept] << (16 - value_bits) & 0xFFFF) | indices % block
    bits = np.arange(kept) + indices // block
    words = np.zeros(int(bits[-1]) // 32 + 1, np.uint32)
    np.bitwise_or.at(words, bits // 32, np.uint32(1) << (bits % 32).astype(np.uint32))
    for at, part in (
        (HEADER_NBYTES, scales.astype(np.uint8)),
        (call.number("records_at"), records.astype("<u2").view(np.uint8)),
    ):
        call.bytes("payload", at, part.size)[:] = part
        add_checksum(head, part, at)
    call.bytes("payload", call.number("counts_at"), words.nbytes).view("<u4")[:] |= words
    add_checksum(head, words.view(np.uint8), call.number("counts_at"))


def _withdraw(call: Call) -> None:
    head, numel = call.bytes("payload", 0, HEADER_NBYTES), call.reach()
    if flags(head)[0]:
        call.array("e_out", 0, numel)[:] = call.array("e_in", 0, numel) if call.values["e_in"] else 0
        call.bytes("payload", HEADER_NBYTES, call.number("nbytes") - HEADER_NBYTES)[:] = 0
        put_checksum(head, call.number("checksum"))


def _settle(call: Call) -> None:
    numel, e_out = call.reach(), call.array("e_out", 0, call.reach())
    if not flags(call.bytes("payload", 0, HEADER_NBYTES))[0]:
        e_out[:] = narrowed(call.array("acc", 0, numel), "bf16")
    elif call.values["e_in"]:
        e_out[:] = call.array("e_in", 0, numel)
    else:
        e_out[:] = 0


def _bits_of(call: Call) -> npt.NDArray[np.uint8]:
    words = call.bytes("payload", call.number("counts_at"), 4 * call.number("words"))
    return np.unpackbits(words, bitorder="little")


def _ones(call: Call) -> None:
    bits, each = _bits_of(call), 32 * _WORDS
    padded = np.zeros(call.programs * each, np.uint64)
    padded[: bits.size] = bits[: padded.size]
    call.array("counts", 0, call.programs)[:] = padded.reshape(call.programs, each).sum(axis=1)


def _add(call: Call) -> None:
    spec: Any = parse(call.kernel.codec)
    block, _, value_bits = spec.topk.layout
    places = np.flatnonzero(_bits_of(call))
    programs = places // (32 * _WORDS)
    places, programs = places[programs < call.programs], programs[programs < call.programs]
    if not places.size:
        return
    starts = np.searchsorted(programs, np.arange(call.programs))
    base = call.array("counts", 0, call.programs).astype(np.int64)
    records = base[programs] + np.arange(places.size) - starts[programs]
    most = int(records.max()) + 1
    record = call.bytes("payload", call.number("records_at"), 2 * most).view("<u2")[records].astype(np.int64)
    scale = power(call.bytes("payload", HEADER_NBYTES, -(-most // GROUP))[records // GROUP].astype(np.int64))
    code = (record.astype(np.uint16).view(np.int16) >> (16 - value_bits)).astype(np.float32)
    targets = (places - records) * block + record % block
    out = call.array("out", 0, int(targets.max()) + 1)
    with np.errstate(all="ignore"):
        out[targets] = out[targets] + (code * scale) * call.real("weight")


def _spoil(call: Call) -> None:
    if any_flag(call, "payloads", call.number("count"), call.number("stride")):
        call.array("out", 0, call.reach())[:] = QUIET_NAN


TWINS: Mapping[str, Callable[[Call], None]] = MappingProxyType(
    {
        "first": _first,
        "histogram": _histogram,
        "narrow": _narrow,
        "count": _count,
        "scan": _scan,
        "collect": _collect,
        "pack": _pack,
        "withdraw": _withdraw,
        "settle": _settle,
        "ones": _ones,
        "add": _add,
        "spoil": _spoil,
    }
)
