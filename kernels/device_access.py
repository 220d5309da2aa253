"""What a launch of a shipped device kernel reads and writes, as ranges of addresses; needs numpy alone.

For whoever orders launches: a checker of plans, a simulated device. Ranges hold all that programs may touch, and are
exact where a kernel writes; payloads are read as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.kernels.device_access_powersgd import POWERSGD
from hybridcomm.kernels.payload import HEADER_NBYTES, align
from hybridcomm.kernels.spec import parse
from hybridcomm.kernels.specs.gtopk import GROUP
from hybridcomm.kernels.specs.quant import QuantSpec

__all__ = ["Range", "Read", "ranges"]

Read = Callable[[int, int], bytes]
"""``read(address, nbytes)``: what stands in device memory when the kernel runs."""

_SIZES = {"u8": 1, "bf16": 2, "fp16": 2, "fp32": 4, "i32": 4, "i64": 8}
_FLAGS, _CHECKSUM, _SEED = (40, 4), (48, 8), (56, 8)  # first byte and length in a payload's header
_BINS, _LOW_BINS = 2048, 1024  # of gtopk's histograms: the first, those behind it
_WORDS = 1024  # words of a payload's counts per program of gtopk's decoder
_ROW = 32  # bytes of a row of a bucket's table: address, place, count, kind
_KINDS = (4, 2, 2)  # bytes per element of a row's tensor


@dataclass(frozen=True, kw_only=True)
class Range:
    """``nbytes`` from address ``begin`` on. ``write``: written, and perhaps read as well; else only read."""

    begin: int
    nbytes: int
    write: bool


@dataclass(kw_only=True)
class Launch:
    """A launch, and the ranges found so far."""

    kernel: DeviceKernel
    values: Mapping[str, Any]
    programs: int | None
    read: Read | None
    found: list[Range] = field(default_factory=list)

    def touch(self, name: str, first: int, nbytes: int, *, write: bool = False) -> None:
        """Bytes of the array that parameter ``name`` points to; none if that is null."""
        if self.values[name] and nbytes > 0:
            self.found.append(Range(begin=int(self.values[name]) + first, nbytes=nbytes, write=write))

    def elements(self, name: str, first: int, last: int, *, write: bool = False) -> None:
        size = next(_SIZES[each.type[1:]] for each in self.kernel.arguments if each.name == name)
        self.touch(name, first * size, (last - first) * size, write=write)

    def number(self, name: str) -> int:
        return int(self.values[name])

    def has(self, name: str) -> bool:
        return any(each.name == name for each in self.kernel.arguments)

    def constant(self, name: str) -> int:
        return dict(self.kernel.constants).get(name, 0)

    def reach(self, numel: int) -> int:
        """Elements that the programs have, of a region of ``numel``."""
        return numel if self.programs is None else min(numel, self.programs * self.kernel.elements)

    def tiles(self, numel: int) -> int:
        return self.kernel.grid(numel) if self.programs is None else self.programs

    def reader(self, what: str) -> Read:
        if self.read is None:
            raise ValueError(f"{self.kernel.name}: its ranges depend on {what} in device memory: pass read")
        return self.read


def ranges(
    kernel: DeviceKernel,
    values: Mapping[str, int | float],
    *,
    programs: int | None = None,
    read: Read | None = None,
) -> tuple[Range, ...]:
    """What a launch of ``kernel`` with these arguments touches: bytes it reads, bytes it writes.

    ``values``: arguments by name, pointers as addresses; null ones touch nothing. ``programs``: of the grid; None: as
    many as the region needs, which only a bucket's kernels cannot know. ``read``: bucket kernels find tensors by a
    table in device memory, gtopk's ``pack`` and ``add`` a region by indices there; without ``read`` these two take
    the region's ``numel`` as a further value.

    Raises:
        ValueError: the ranges need ``programs`` or ``read``.
        KeyError: an argument is missing, or the kernel is none of those that are shipped.
    """
    launch = Launch(kernel=kernel, values=values, programs=programs, read=read)
    if kernel.source == "cuda/gtopk.cu":
        _GTOPK[kernel.function.removeprefix("gtopk_").split("_")[0]](launch)
    elif kernel.source == "cuda/powersgd.cu":
        POWERSGD[kernel.function.split("_")[1]](launch)
    elif kernel.function == "bucket_kernel":
        _bucket(launch)
    elif kernel.function == "withdraw_kernel":
        _withdraw(launch)
    else:
        kind = kernel.function.removeprefix("topk_").split("_")[0]
        _CODECS[kind](launch)
    return tuple(launch.found)


def _span(launch: Launch) -> tuple[int, int]:
    """First and last element of the launch's programs."""
    size, numel, first = launch.kernel.elements, launch.number("numel"), int(launch.values.get("first", 0))
    if not launch.has("first"):
        return 0, launch.reach(numel)
    whole = launch.constant("WHOLE")
    programs = launch.programs if launch.programs is not None else (numel // size - first if whole else 1)
    return first * size, min((first + programs) * size, numel)


def _sections(launch: Launch, first: int, last: int) -> None:
    """What encoding these elements writes of a payload's body."""
    spec: Any = parse(launch.kernel.codec)
    if isinstance(spec, QuantSpec):
        scales = spec.scale_nbytes * first // spec.block, spec.scale_nbytes * spec.nblocks(last)
        codes = first * spec.value_bits // 8, -(-last * spec.value_bits // 8)
        if not launch.constant("WHOLE"):  # zeros up to the sections' ends
            scales, codes = (scales[0], align(scales[1])), (codes[0], align(codes[1]))
        at = 16 * launch.number("codes")
    else:
        blocks, width = spec.nblocks(last), 1 if launch.has("codes_at") else 2
        scales, codes = (0, blocks), (0, width * spec.layout[1] * blocks)
        at = _second(launch)
    launch.touch("payload", HEADER_NBYTES + scales[0], scales[1] - scales[0], write=True)
    launch.touch("payload", at + codes[0], codes[1] - codes[0], write=True)


def _second(launch: Launch) -> int:
    """First byte of the section behind the scales."""
    if launch.has("records_half"):
        return 2 * launch.number("records_half")
    return launch.number("codes_at" if launch.has("codes_at") else "records_at")


def _payloads(launch: Launch) -> None:
    """All bytes of the payloads that are added."""
    spec, stride, numel = parse(launch.kernel.codec), launch.number("stride"), launch.number("numel")
    for w in range(launch.number("count")):
        launch.touch("payloads", w * stride, spec.nbytes(numel))


def _encode(launch: Launch) -> None:
    first, last = _span(launch)
    if launch.has("grad"):
        launch.elements("grad", first, last)
    launch.elements("e_in", first, last)
    launch.elements("e_out", first, last, write=True)
    if launch.has("codes_at"):
        launch.touch("payload", *_SEED)
    launch.touch("payload", *_FLAGS, write=True)
    launch.touch("payload", *_CHECKSUM, write=True)
    _sections(launch, first, last)


def _reencode(launch: Launch) -> None:
    _payloads(launch)
    if launch.has("sums"):
        launch.elements("sums", *_span(launch), write=True)
    _encode(launch)


def _decode(launch: Launch) -> None:
    _payloads(launch)
    first, last = _span(launch)
    launch.elements("out", first, last, write=True)


def _withdraw(launch: Launch) -> None:
    """Of Triton's: programs share a region of any size out among them."""
    numel = launch.number("numel")
    launch.touch("payload", *_FLAGS)
    launch.elements("e_in", 0, numel)
    launch.elements("e_out", 0, numel, write=True)
    launch.touch("payload", *_CHECKSUM, write=True)
    launch.touch("payload", HEADER_NBYTES, 4 * launch.number("nwords"), write=True)


def _withdraw_records(launch: Launch) -> None:
    """Of topk's in CUDA C++."""
    first, last = _span(launch)
    launch.touch("payload", *_FLAGS)
    launch.elements("e_in", first, last)
    launch.elements("e_out", first, last, write=True)
    launch.touch("payload", *_CHECKSUM, write=True)
    _sections(launch, first, last)


def _bucket(launch: Launch) -> None:
    if launch.programs is None:
        raise ValueError(f"{launch.kernel.name}: programs wanted, a row of the table each")
    launch.touch("table", 0, _ROW * launch.programs)
    table = launch.reader("the table")(launch.number("table"), _ROW * launch.programs)
    into = launch.constant("INTO") == 1
    for address, start, count, kind in np.frombuffer(table, np.int64).reshape(-1, 4).tolist():
        nbytes = count * _KINDS[kind % 3]
        launch.found.append(Range(begin=address, nbytes=nbytes, write=not into))
        launch.elements("bucket", start, start + count, write=into)


def _first(launch: Launch) -> None:
    last = launch.reach(launch.number("numel"))
    launch.elements("grad", 0, last)
    launch.elements("e_in", 0, last)
    launch.elements("acc", 0, last, write=True)
    launch.touch("payload", *_FLAGS, write=True)
    launch.elements("bins", 0, _BINS, write=True)


def _histogram(launch: Launch) -> None:
    launch.elements("acc", 0, launch.reach(launch.number("numel")))
    launch.touch("found", 0, 8)
    launch.elements("bins", 0, _LOW_BINS, write=True)


def _narrow(launch: Launch) -> None:
    launch.elements("bins", 0, _BINS)
    launch.touch("found", 0, 8)
    launch.touch("to", 0, 8, write=True)


def _count(launch: Launch) -> None:
    numel = launch.number("numel")
    launch.elements("acc", 0, launch.reach(numel))
    launch.touch("found", 0, 8)
    launch.elements("counts", 0, launch.tiles(numel), write=True)


def _scan(launch: Launch) -> None:
    launch.elements("counts", 0, launch.number("tiles"), write=True)


def _collect(launch: Launch) -> None:
    numel, spec = launch.number("numel"), parse(launch.kernel.codec)
    kept = spec.kept(numel)  # type: ignore[attr-defined]  # gtopk's spec
    launch.elements("acc", 0, launch.reach(numel))
    launch.touch("found", 0, 8)
    launch.elements("counts", 0, launch.tiles(numel))
    launch.elements("values", 0, kept, write=True)
    launch.elements("indices", 0, kept, write=True)


def _pack(launch: Launch) -> None:
    """Indices ascend: the first and the last one bound the region."""
    kept, counts_at, block = launch.number("kept"), launch.number("counts_at"), launch.constant("BLOCK")
    if "numel" in launch.values:
        first, last = 0, launch.number("numel") - 1
    else:
        read, at = launch.reader("indices"), launch.number("indices")
        first, last = (int.from_bytes(read(at + 4 * r, 4), "little") for r in (0, kept - 1))
    launch.elements("values", 0, kept)
    launch.elements("indices", 0, kept)
    launch.elements("rest", first, last + 1, write=True)
    launch.touch("payload", *_CHECKSUM, write=True)
    launch.touch("payload", HEADER_NBYTES, -(-kept // GROUP), write=True)
    launch.touch("payload", launch.number("records_at"), 2 * kept, write=True)
    words = (kept - 1 + last // block) // 32 + 1
    launch.touch("payload", counts_at, 4 * words, write=True)


def _withdraw_region(launch: Launch) -> None:
    """Of gtopk's."""
    last = launch.reach(launch.number("numel"))
    launch.touch("payload", *_FLAGS)
    launch.elements("e_in", 0, last)
    launch.elements("e_out", 0, last, write=True)
    launch.touch("payload", *_CHECKSUM, write=True)
    launch.touch("payload", HEADER_NBYTES, launch.number("nbytes") - HEADER_NBYTES, write=True)


def _settle(launch: Launch) -> None:
    last = launch.reach(launch.number("numel"))
    launch.touch("payload", *_FLAGS)
    launch.elements("acc", 0, last)
    launch.elements("e_in", 0, last)
    launch.elements("e_out", 0, last, write=True)


def _programs(launch: Launch) -> int:
    return -(-launch.number("words") // _WORDS) if launch.programs is None else launch.programs


def _ones(launch: Launch) -> None:
    launch.touch("payload", launch.number("counts_at"), 4 * launch.number("words"))
    launch.elements("counts", 0, _programs(launch), write=True)


def _add(launch: Launch) -> None:
    """Bits that are set in a payload's counts are its records, zeros before the last of them are blocks."""
    counts_at, records_at = launch.number("counts_at"), launch.number("records_at")
    nbytes = counts_at + 4 * launch.number("words")
    launch.touch("payload", HEADER_NBYTES, nbytes - HEADER_NBYTES)
    launch.elements("counts", 0, _programs(launch))
    if "numel" in launch.values:
        launch.elements("out", 0, launch.number("numel"), write=True)
        return
    read, payload, block = launch.reader("records"), launch.number("payload"), launch.constant("BLOCK")
    words = np.frombuffer(read(payload + counts_at, nbytes - counts_at), np.uint8)
    places = np.flatnonzero(np.unpackbits(words, bitorder="little"))
    if places.size:
        record = read(payload + records_at + 2 * (places.size - 1), 2)
        last = (int(places[-1]) - places.size + 1) * block + int.from_bytes(record, "little") % block
        launch.elements("out", 0, last + 1, write=True)


def _spoil(launch: Launch) -> None:
    for w in range(launch.number("count")):
        launch.touch("payloads", w * launch.number("stride") + _FLAGS[0], _FLAGS[1])
    launch.elements("out", 0, launch.reach(launch.number("numel")), write=True)


_CODECS: Mapping[str, Callable[[Launch], None]] = MappingProxyType(
    {"encode": _encode, "reencode": _reencode, "decode": _decode, "withdraw": _withdraw_records}
)
_GTOPK: Mapping[str, Callable[[Launch], None]] = MappingProxyType(
    {
        "first": _first,
        "histogram": _histogram,
        "narrow": _narrow,
        "count": _count,
        "scan": _scan,
        "collect": _collect,
        "pack": _pack,
        "withdraw": _withdraw_region,
        "settle": _settle,
        "ones": _ones,
        "add": _add,
        "spoil": _spoil,
    }
)
