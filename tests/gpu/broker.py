"""Where simulated ranks of several processes meet: what each puts at a place, all get when all have come.

    with Broker() as broker:
        ...                 # processes with HYBRIDCOMM_SIM_BROKER=broker.path in their environment

The protocol (``sim/broker.h``): every request and answer is a text; a text is its length and its bytes, a number eight
bytes, little endian.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

__all__ = ["Broker"]


class _GoneError(Exception):
    """The process at the other end has ended."""


@dataclass(kw_only=True)
class _Place:
    """``fetched``: who has got what all have put here; when everyone has, it is forgotten."""

    wanted: int
    put: dict[int, bytes] = field(default_factory=dict)
    fetched: set[int] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return len(self.put) >= self.wanted


class _Request:
    """Reads a request's parts in their order."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self) -> int:
        (value,) = struct.unpack_from("<Q", self._data, self._at)
        self._at += 8
        return int(value)

    def text(self) -> bytes:
        size = self.number()
        self._at += size
        return self._data[self._at - size : self._at]


def _numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


class Broker:
    """Serves in threads until it is left. ``path``: of its Unix socket."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="hybridcomm-broker-")
        self.path = str(Path(self._folder) / "socket")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen(64)
        self._lock = threading.Lock()
        self._places: dict[bytes, _Place] = {}
        self._lost: dict[bytes, set[int]] = {}
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> Broker:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(timeout=10)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        def receive(size: int) -> bytes:
            data = bytearray()
            while len(data) < size:
                part = connection.recv(size - len(data))
                if not part:
                    raise _GoneError
                data += part
            return bytes(data)

        with connection, contextlib.suppress(_GoneError, OSError):
            while True:
                (size,) = struct.unpack("<Q", receive(8))
                answer = self._answer(_Request(receive(size)))
                connection.sendall(_numbers(len(answer)) + answer)

    def _answer(self, request: _Request) -> bytes:
        acts: tuple[Callable[[_Request], bytes], ...] = (
            self._put,
            self._found,
            self._withdraw,
            self._lose,
            self._tell_lost,
        )
        with self._lock:
            return acts[request.number() - 1](request)

    def _put(self, request: _Request) -> bytes:
        where, wanted, rank, what = request.text(), request.number(), request.number(), request.text()
        self._places.setdefault(where, _Place(wanted=wanted)).put[rank] = what
        return b""

    def _found(self, request: _Request) -> bytes:
        where, rank = request.text(), request.number()
        place = self._places.get(where, _Place(wanted=1))
        parts = [_numbers(int(place.complete), len(place.put))]
        for who, what in sorted(place.put.items()):
            told = what if place.complete else b""
            parts.append(_numbers(who, len(told)) + told)
        if place.complete:
            place.fetched.add(rank)
            if len(place.fetched) >= place.wanted:
                self._places.pop(where, None)
        return b"".join(parts)

    def _withdraw(self, request: _Request) -> bytes:
        """What is complete stays so: others may have it already."""
        where, rank = request.text(), request.number()
        place = self._places.get(where)
        if place is not None and not place.complete:
            place.put.pop(rank, None)
        return b""

    def _lose(self, request: _Request) -> bytes:
        clique, rank = request.text(), request.number()
        self._lost.setdefault(clique, set()).add(rank)
        return b""

    def _tell_lost(self, request: _Request) -> bytes:
        ranks = self._lost.get(request.text(), set())
        return _numbers(len(ranks), *sorted(ranks))
