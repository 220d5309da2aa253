"""Key-value stores that ranks find each other through."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hybridcomm.errors import BootstrapError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store as TorchStore

__all__ = ["C10dStore", "DirectoryStore", "PrefixStore", "Store"]


class Store(Protocol):
    """What the bootstrap needs of a store; both methods may be called from one thread per rank."""

    def set(self, key: str, value: bytes) -> None: ...

    def get(self, key: str, timeout: float) -> bytes:
        """Waits for the key; raises `TimeoutError` after ``timeout`` s."""
        ...

    def count(self, key: str) -> int:
        """Adds one to a counter that only the calling rank uses, and returns it."""
        ...


class DirectoryStore:
    """A store of files, for ranks that share a directory: the launcher's, on one machine."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        if not self._path.is_dir():
            raise BootstrapError(
                f"store directory {self._path} does not exist; was the launcher's job ended?"
            )

    def _file(self, key: str) -> Path:
        return self._path / key.replace("/", "-")

    def set(self, key: str, value: bytes) -> None:
        file = self._file(key)
        new = file.with_name(f"{file.name}.{os.getpid()}.new")
        new.write_bytes(value)
        new.replace(file)  # readers see all of it or nothing

    def get(self, key: str, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        while True:
            try:
                return self._file(key).read_bytes()
            except FileNotFoundError:
                if time.monotonic() > deadline:
                    raise TimeoutError(key) from None
                time.sleep(0.002)

    def count(self, key: str) -> int:
        file = self._file(key)
        value = int(file.read_bytes()) + 1 if file.exists() else 1
        self.set(key, str(value).encode())
        return value


class PrefixStore:
    """A part of another store, whose keys begin with ``prefix``."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store, self._prefix = store, prefix

    def set(self, key: str, value: bytes) -> None:
        self._store.set(f"{self._prefix}/{key}", value)

    def get(self, key: str, timeout: float) -> bytes:
        return self._store.get(f"{self._prefix}/{key}", timeout)

    def count(self, key: str) -> int:
        return self._store.count(f"{self._prefix}/{key}")


class C10dStore:
    """Any ``torch.distributed`` store (TCPStore, FileStore, HashStore, PrefixStore, ...)."""

    def __init__(self, store: TorchStore) -> None:
        self._store = store

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, value.hex())  # c10d stores take text

    def get(self, key: str, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        while True:
            # In slices, because torch's wait does not look at signals: Ctrl-C would have to wait for its end.
            begin = time.monotonic()
            limit = min(max(deadline - begin, 0.01), 0.5)
            try:
                self._store.wait([key], timedelta(seconds=limit))
                break
            except RuntimeError as error:
                gone = time.monotonic() < begin + limit / 2  # no timeout: the server has ended
                if gone or time.monotonic() >= deadline:
                    raise TimeoutError(f"{key}: {error}") from error
        return bytes.fromhex(self._store.get(key).decode())

    def count(self, key: str) -> int:
        return int(self._store.add(key, 1))
