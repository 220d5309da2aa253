"""The handshake spoken from Python, by its description in docs/wire-format.md, and a rank to try it on."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hybridcomm.context import Context
from hybridcomm.store import DirectoryStore
from hybridcomm.topology import Topology

__all__ = ["HELLO_NBYTES", "LonelyRank", "lonely_rank", "make_hello", "make_proof", "read_exactly"]

_HELLO = struct.Struct("<4sIiiiI16s")
HELLO_NBYTES = _HELLO.size
CHALLENGE_NBYTES = 48
WELCOME = b"WLME"


def make_hello(
    rank: int, peer: int = 0, channel: int = 0, *, magic: bytes = b"HYBC", version: int = 3
) -> bytes:
    return _HELLO.pack(magic, version, rank, peer, channel, 0, os.urandom(16))


def make_proof(token: bytes, hello: bytes, nonce: bytes, *, by_dialler: bool) -> bytes:
    return hashlib.blake2s(hello + nonce + bytes([by_dialler]), key=token).digest()


def read_exactly(connection: socket.socket, nbytes: int) -> bytes:
    """Fewer only where the peer has closed."""
    data = b""
    try:
        while len(data) < nbytes and (more := connection.recv(nbytes - len(data))):
            data += more
    except ConnectionResetError:
        pass
    return data


@dataclass
class LonelyRank:
    """Rank 0, which waits for a rank 1 on another node (or its own) that only the test plays."""

    port: int
    token: bytes
    outcome: list[Any] = field(default_factory=list)

    def dial(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.settimeout(10)
        return connection

    def dial_unix(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(10)
        name = f"\0hybridcomm-{hashlib.blake2b(self.token, digest_size=12).hexdigest()}-0"
        deadline = time.monotonic() + 10
        while connection.connect_ex(name) != 0:  # not listening yet
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return connection

    def join(self, connection: socket.socket, token: bytes, *, channel: int = 0) -> bool:
        """A whole handshake as rank 1; whether it was welcome."""
        hello = make_hello(1, channel=channel)
        connection.sendall(hello)
        challenge = read_exactly(connection, CHALLENGE_NBYTES)
        if len(challenge) < CHALLENGE_NBYTES:
            return False
        connection.sendall(make_proof(token, hello, challenge[:16], by_dialler=True))
        return read_exactly(connection, len(WELCOME)) == WELCOME


@contextmanager
def lonely_rank(*, timeout: float, per_node: int = 1) -> Iterator[LonelyRank]:
    """Runs rank 0 of two in a thread; ``outcome`` holds its context or error after the block."""
    with tempfile.TemporaryDirectory(prefix="hybridcomm-test-") as directory:
        store = DirectoryStore(directory)
        outcome: list[Any] = []

        def body() -> None:
            try:
                topology = Topology.virtual(2 // per_node, per_node)
                outcome.append(Context.connect(topology, store=store, rank=0, world_size=2, timeout=timeout))
            except Exception as error:
                outcome.append(error)

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        entry = json.loads(store.get("init1/rank0", 10))
        store.set("init1/rank1", json.dumps({**entry, "port": 1}).encode())
        rank = LonelyRank(port=entry["port"], token=store.get("init1/token", 10), outcome=outcome)
        yield rank
        thread.join(timeout + 20)
        assert not thread.is_alive(), "rank 0 hangs"
