"""Shipped kernels executed as PTX, and watched: which bytes they touch, and whether their twin would do the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.kernels.device_access import Range, ranges
from tests.gpu.calls import Call
from tests.gpu.twins import Twin, twin_of
from tests.ptx import Counters, Memory
from tests.ptx.conformance import Executable, executable

__all__ = ["Watch"]

Bytes = npt.NDArray[np.uint8]


@dataclass(kw_only=True)
class _Touched:
    """Of a buffer's bytes, which were read and which were written."""

    address: int
    read: npt.NDArray[np.bool_]
    written: npt.NDArray[np.bool_]


class _Region:
    """A buffer of the executor; notes what passes through."""

    def __init__(self, region: Any, touched: _Touched) -> None:
        self._region, self._touched = region, touched

    def load(self, offsets: Any, width: int, stamps: Any) -> Any:
        for i in range(width):
            self._touched.read[offsets + i] = True
        return self._region.load(offsets, width, stamps)

    def store(self, offsets: Any, rows: Any, stamps: Any) -> None:
        for i in range(rows.shape[1]):
            self._touched.written[offsets + i] = True
        self._region.store(offsets, rows, stamps)

    def atomic(self, offsets: Any, width: int, stamps: Any) -> Any:
        for i in range(width):
            self._touched.written[offsets + i] = True
        return self._region.atomic(offsets, width, stamps)


class _Watched(Memory):
    """The same buffers."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._buffers, self._next = memory._buffers, memory._next
        self.touched = {
            buffer.address: _Touched(
                address=buffer.address,
                read=np.zeros(buffer.nbytes, np.bool_),
                written=np.zeros(buffer.nbytes, np.bool_),
            )
            for buffer in self._buffers
        }

    def locate(self, addresses: Any, width: int) -> Iterator[tuple[Any, Any, Any]]:
        for region, lanes, offsets in super().locate(addresses, width):
            yield _Region(region, self.touched[region.address]), lanes, offsets  # type: ignore[attr-defined]

    def contents(self) -> dict[int, Bytes]:
        return {buffer.address: buffer.data[: buffer.nbytes].copy() for buffer in self._buffers}


def _viewer(contents: Mapping[int, Bytes]) -> Callable[[int, int], Bytes]:
    def view(address: int, nbytes: int) -> Bytes:
        start = max(each for each in contents if each <= address)
        found = contents[start][address - start :][:nbytes]
        if found.size != nbytes:
            raise IndexError(f"{nbytes} bytes at byte {address - start} of {contents[start].size}")
        return found

    return view


@dataclass(kw_only=True)
class Watch:
    """Where a `PtxRun` has its executables from (``load=watch.load``). ``wrong`` keeps what was not as declared.

    ``twin``: compared where ``compare``, which is no use on values that are not finite. ``kernels``: by name, whether
    each declared write has been seen.
    """

    arch: int = 90
    compare: bool = True
    twin: Callable[[DeviceKernel], Twin] = twin_of
    declare: Callable[..., tuple[Range, ...]] = ranges
    wrong: list[str] = field(default_factory=list)
    kernels: dict[str, dict[str, bool]] = field(default_factory=dict)

    def load(self, kernel: DeviceKernel, arch: int) -> Any:
        return _Executable(watch=self, kernel=kernel, made=executable(kernel, arch))

    def unwritten(self) -> list[str]:
        """Arrays that were declared as written and never were."""
        return [
            f"{kernel}: {name}" for kernel, seen in self.kernels.items() for name in seen if not seen[name]
        ]


@dataclass(frozen=True, kw_only=True)
class _Executable:
    watch: Watch
    kernel: DeviceKernel
    made: Executable

    def launch(self, memory: Memory, elements: int, /, **arguments: int | float) -> Counters:
        watched, programs = _Watched(memory), self.kernel.grid(elements)
        before = watched.contents()
        view = _viewer(before)
        declared = self.watch.declare(
            self.kernel, arguments, programs=programs, read=lambda a, n: view(a, n).tobytes()
        )
        counters = self.made.launch(watched, elements, **arguments)
        self._check(watched, declared, arguments)
        if self.watch.compare:
            self.watch.twin(self.kernel)(
                Call(kernel=self.kernel, programs=programs, values=arguments, view=view)
            )
            after = watched.contents()
            for address, values in before.items():
                differ = np.flatnonzero(values != after[address])
                if differ.size:
                    self.watch.wrong.append(
                        f"{self.kernel.name}: its twin, {differ.size} bytes from {differ[0]} of {values.size} on"
                    )
        return counters

    def _check(
        self, watched: _Watched, declared: tuple[Range, ...], arguments: Mapping[str, int | float]
    ) -> None:
        name, seen = self.kernel.name, self.watch.kernels.setdefault(self.kernel.name, {})
        starts = sorted(watched.touched)
        reads = {start: np.zeros_like(watched.touched[start].read) for start in starts}
        writes = {start: np.zeros_like(watched.touched[start].read) for start in starts}
        for each in declared:
            start = max(start for start in starts if start <= each.begin)
            part = slice(each.begin - start, each.begin - start + each.nbytes)
            if part.stop > reads[start].size:
                self.watch.wrong.append(f"{name}: declares {each} outside of its buffer")
            reads[start][part] = True
            if each.write:
                writes[start][part] = True
                array = _array(start, each, arguments)
                seen[array] = seen.get(array, False) or bool(watched.touched[start].written[part].any())
        for start, touched in watched.touched.items():
            for what, bytes_, allowed in (
                ("reads", touched.read, reads[start]),
                ("writes", touched.written, writes[start]),
            ):
                stray = np.flatnonzero(bytes_ & ~allowed)
                if stray.size:
                    self.watch.wrong.append(
                        f"{name}: {what} {stray.size} bytes from {stray[0]} on, undeclared"
                    )


def _array(start: int, declared: Range, arguments: Mapping[str, int | float]) -> str:
    """The parameter that a range belongs to: the nearest one before it in its buffer. In a payload, header and
    sections count for themselves."""
    near = [
        (int(value), name)
        for name, value in arguments.items()
        if isinstance(value, int) and start <= value <= declared.begin
    ]
    if not near:
        return "tensors"
    base, name = max(near)
    return f"{name}, {'header' if declared.begin - base < 64 else 'body'}" if name == "payload" else name
