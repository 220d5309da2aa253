"""Strangers in numbers, before and during a job: they can neither join it, nor stop it, nor use up its descriptors."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from hybridcomm.errors import PeerLostError
from hybridcomm.store import DirectoryStore
from hybridcomm.topology import Topology
from tests.census import census
from tests.engine_ranks import each_rank, engine_contexts
from tests.hybridcomm.handshake import (
    CHALLENGE_NBYTES,
    WELCOME,
    LonelyRank,
    lonely_rank,
    make_hello,
    make_proof,
    read_exactly,
)
from tests.native import ROOT

SIZES = [2, 1, 1]


class Addresses:
    """Where the ranks of the jobs that start meanwhile listen, as the store tells it."""

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.names: list[str] = []

    def note(self, key: str, value: bytes) -> None:
        if "/rank" in key:
            self.ports.append(json.loads(value)["port"])
        if key.endswith("/token"):
            stem = f"\0hybridcomm-{hashlib.blake2b(value, digest_size=12).hexdigest()}"
            self.names += [f"{stem}-{rank}" for rank in range(sum(SIZES))]

    def dial_all(self) -> Iterator[socket.socket]:
        for port in self.ports:
            tcp = socket.socket()
            tcp.settimeout(2)
            if tcp.connect_ex(("127.0.0.1", port)) == 0:
                yield tcp
            else:
                tcp.close()
        for name in self.names:
            local = socket.socket(socket.AF_UNIX)
            local.settimeout(2)
            if local.connect_ex(name) == 0:
                yield local
            else:
                local.close()


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> Addresses:
    found, store_set = Addresses(), DirectoryStore.set

    def set_and_note(self: DirectoryStore, key: str, value: bytes) -> None:
        found.note(key, value)
        store_set(self, key, value)

    monkeypatch.setattr(DirectoryStore, "set", set_and_note)
    return found


def flood(addresses: Addresses, until: threading.Event, rounds: list[int]) -> None:
    """Silence, noise, halves and whole hellos in the name of every rank, again and again."""
    noise = np.random.default_rng(3)
    while not until.is_set():
        with ExitStack() as held:
            for connection in addresses.dial_all():
                held.enter_context(connection)
                hello = make_hello(int(noise.integers(0, 4)), int(noise.integers(0, 4)))
                said = [b"", noise.bytes(100), hello[:20], hello, hello + noise.bytes(32)][len(rounds) % 5]
                try:
                    connection.sendall(said)
                except OSError:
                    continue
        rounds.append(1)


def work_under_flood(addresses: Addresses, rounds: list[int]) -> None:
    """Connects, calls while 20 rounds of strangers come, closes."""
    with engine_contexts(Topology.from_sizes(SIZES)) as contexts:
        assert len(addresses.ports) == len(addresses.names) == 4
        world, at_start = len(contexts), len(rounds)

        def body(rank: int) -> int:
            number, more = 0, np.ones(1, np.float32)
            while more[0]:
                value = np.full(1 + 997 * (number % 7), rank + number, np.float32)
                work = contexts[rank].allreduce(value, async_op=number % 2 == 0)
                if work is not None:
                    work.wait()
                assert (value == sum(range(world)) + world * number).all(), (rank, number)
                number += 1
                more[0] = number < 60 or len(rounds) < at_start + 20
                contexts[rank].broadcast(more, 0)  # rank 0 says for all when it is enough
            return number

        counts = each_rank(body, world)
        assert counts == counts[:1] * world
        assert counts[0] >= 60


def test_a_flood_during_a_running_job_changes_nothing(addresses: Addresses) -> None:
    """From before the ranks connect until after they have closed."""
    before, until, rounds = census(), threading.Event(), []
    thread = threading.Thread(target=flood, args=(addresses, until, rounds), daemon=True)
    thread.start()
    work_under_flood(addresses, rounds)
    until.set()
    thread.join(30)
    assert not thread.is_alive()
    assert census() == before, "no descriptor of a stranger stays"


def test_a_slow_peer_is_not_pushed_out_by_claims_of_its_place() -> None:
    """Strangers who say a hello in its name while it makes its proof; they cannot give one."""

    def join_slowly(rank: LonelyRank, channel: int, claims: int) -> socket.socket:
        connection, hello = rank.dial(), make_hello(1, channel=channel)
        connection.sendall(hello)
        nonce = read_exactly(connection, CHALLENGE_NBYTES)[:16]
        for _ in range(claims):
            stranger = rank.dial()
            stranger.sendall(make_hello(1, channel=channel))
            assert len(read_exactly(stranger, CHALLENGE_NBYTES)) == CHALLENGE_NBYTES
            strangers.append(stranger)
        connection.sendall(make_proof(rank.token, hello, nonce, by_dialler=True))
        assert read_exactly(connection, len(WELCOME)) == WELCOME
        return connection

    strangers: list[socket.socket] = []
    with lonely_rank(timeout=30.0) as rank:
        connections = [join_slowly(rank, channel, claims) for channel, claims in ((0, 12), (1, 3), (2, 0))]
        for connection in (*connections, *strangers):
            connection.close()
    assert isinstance(rank.outcome[0], PeerLostError), "connected, then rank 1 was gone"


LIMITED = """
import os, resource, sys, threading
from hybridcomm.context import Context
from hybridcomm.errors import PeerLostError
from hybridcomm.store import DirectoryStore
from hybridcomm.topology import Topology

failures, done = [], threading.Event()

def open_files():
    while not done.wait(0.01):
        try:
            for fd in [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]:
                os.close(fd)
        except OSError as error:
            failures.append(error)

limit = len(os.listdir("/proc/self/fd")) + 200
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
thread = threading.Thread(target=open_files)
thread.start()
try:
    Context.connect(Topology.virtual(2, 1), store=DirectoryStore(sys.argv[1]), rank=0, world_size=2, timeout=60)
except PeerLostError:
    print("connected")
done.set()
thread.join()
print(len(failures), "failures", failures[:1])
"""


def test_strangers_do_not_use_up_the_descriptors(tmp_path: Path) -> None:
    """Six hundred silent ones at a rank that may open two hundred; its own threads go on opening files."""
    store = DirectoryStore(tmp_path)
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        entry = json.loads(store.get("init1/rank0", 60))
        rank = LonelyRank(port=entry["port"], token=store.get("init1/token", 10))
        store.set("init1/rank1", json.dumps({**entry, "port": 1}).encode())
        strangers = [rank.dial() for _ in range(600)]
        connections = [rank.dial() for _ in range(3)]
        for channel, connection in enumerate(connections):
            assert rank.join(connection, rank.token, channel=channel)
        for connection in (*connections, *strangers):
            connection.close()
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert "connected" in printed
    assert "\n0 failures" in printed


def test_every_job_has_a_secret_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[bytes] = []
    store_set: Callable[..., None] = DirectoryStore.set

    def set_and_note(self: DirectoryStore, key: str, value: bytes) -> None:
        if key.endswith("/token"):
            tokens.append(value)
        store_set(self, key, value)

    monkeypatch.setattr(DirectoryStore, "set", set_and_note)
    for _ in range(3):
        with engine_contexts(Topology.virtual(2, 1)):
            pass
    assert len(set(tokens)) == 3
    assert {len(token) for token in tokens} == {16}
