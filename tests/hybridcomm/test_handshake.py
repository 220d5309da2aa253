"""Peers prove the job's secret on connecting; strangers neither join, nor crash a rank, nor learn anything."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridcomm import _C
from hybridcomm.context import Context
from hybridcomm.errors import BootstrapError, PeerLostError, SharedMemoryError
from hybridcomm.store import DirectoryStore
from hybridcomm.topology import Topology
from tests.engine_ranks import close_all, each_rank, engine_contexts
from tests.hybridcomm.handshake import (
    CHALLENGE_NBYTES,
    HELLO_NBYTES,
    LonelyRank,
    lonely_rank,
    make_hello,
    make_proof,
    read_exactly,
)

NOISE = np.random.default_rng(7)


def add_up(contexts: list[Any]) -> None:
    def body(rank: int) -> None:
        value = np.full(1000, rank + 1, np.float32)
        contexts[rank].allreduce(value)
        assert (value == sum(range(1, len(contexts) + 1))).all()

    assert each_rank(body, len(contexts)) == [None] * len(contexts)


@pytest.mark.parametrize("key_nbytes", [0, 1, 16, 32])
def test_the_hash_is_blake2s(key_nbytes: int) -> None:
    for nbytes in [*range(200), 1000, 4096]:
        key, data = NOISE.bytes(key_nbytes), NOISE.bytes(nbytes)
        assert _C.blake2s(key, data) == hashlib.blake2s(data, key=key).digest()


def join_and_leave(rank: LonelyRank) -> None:
    """As rank 1: a control channel and two data channels."""
    connections = [rank.dial() for _ in range(3)]
    for channel in (1, 2, 0):
        assert rank.join(connections[channel], rank.token, channel=channel)
        if channel == 1:
            with rank.dial() as again:
                assert not rank.join(again, rank.token, channel=1), "a rank joins once"
    for connection in connections:
        connection.close()


def test_control_who_knows_the_secret_joins() -> None:
    """Otherwise the refusals below could have any reason."""
    with lonely_rank(timeout=20.0) as rank:
        join_and_leave(rank)
    assert isinstance(rank.outcome[0], PeerLostError), "connected, then rank 1 was gone"


# -- what strangers try on a rank that waits ---------------------------------------------------------------


def wrong_token(rank: LonelyRank) -> bool:
    with rank.dial() as connection:
        return rank.join(connection, NOISE.bytes(16))


def one_bit_off(rank: LonelyRank) -> bool:
    with rank.dial() as connection:
        return rank.join(connection, bytes([rank.token[0] ^ 1]) + rank.token[1:])


def reflected(rank: LonelyRank) -> bool:
    """The listener's own proof, sent back."""
    with rank.dial() as connection:
        connection.sendall(make_hello(1))
        challenge = read_exactly(connection, CHALLENGE_NBYTES)
        connection.sendall(challenge[16:])
        return read_exactly(connection, 4) != b""


def replayed(rank: LonelyRank) -> bool:
    """What a true rank 1 said on another connection, byte for byte."""
    hello = make_hello(1, channel=2)
    with rank.dial() as honest, rank.dial() as stranger:
        honest.sendall(hello)
        nonce = read_exactly(honest, CHALLENGE_NBYTES)[:16]
        stranger.sendall(hello + make_proof(rank.token, hello, nonce, by_dialler=True))
        return len(read_exactly(stranger, CHALLENGE_NBYTES + 4)) > CHALLENGE_NBYTES


def another_hello(change: Callable[[], bytes]) -> Callable[[LonelyRank], bool]:
    """Hellos that are refused before any challenge."""

    def attempt(rank: LonelyRank) -> bool:
        with rank.dial() as connection:
            with contextlib.suppress(ConnectionError):  # refused before it was all said
                connection.sendall(change())
            return read_exactly(connection, 1) != b""

    return attempt


ATTEMPTS: dict[str, Callable[[LonelyRank], bool]] = {
    "wrong token": wrong_token,
    "one bit off": one_bit_off,
    "reflected": reflected,
    "replayed": replayed,
    "noise": another_hello(lambda: NOISE.bytes(HELLO_NBYTES)),
    "too much": another_hello(lambda: NOISE.bytes(1 << 20)),
    "http": another_hello(lambda: b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: scanner\r\n\r\n"),
    "version 1": another_hello(lambda: make_hello(1, version=1)),
    "wrong magic": another_hello(lambda: make_hello(1, magic=b"HYBD")),
    "unknown rank": another_hello(lambda: make_hello(7)),
    "own rank": another_hello(lambda: make_hello(0)),
    "for another rank": another_hello(lambda: make_hello(1, peer=1)),
    "channel": another_hello(lambda: make_hello(1, channel=3)),
    "negative channel": another_hello(lambda: make_hello(1, channel=-1)),
}


@pytest.fixture(scope="module")
def waiting_rank() -> Any:
    with lonely_rank(timeout=60.0) as rank:
        yield rank
        join_and_leave(rank)  # nobody has taken rank 1's place, and rank 0 is well
    assert isinstance(rank.outcome[0], PeerLostError)


@pytest.mark.xdist_group("waiting_rank")
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_strangers_are_refused(waiting_rank: LonelyRank, attempt: str) -> None:
    assert not ATTEMPTS[attempt](waiting_rank)


# -- and on a job that starts ------------------------------------------------------------------------------


def disturb_all(port: int, strangers: list[socket.socket]) -> None:
    hello = make_hello(1)
    for data in [b"", hello[:10], hello, NOISE.bytes(200), *[b""] * 96]:
        strangers.append(socket.create_connection(("127.0.0.1", port)))
        strangers[-1].sendall(data)


def test_a_crowd_of_silent_strangers_delays_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hundred at each listener, most saying nothing and staying: each would once have cost two seconds."""
    store_set = DirectoryStore.set
    strangers: list[socket.socket] = []

    def set_and_disturb(self: DirectoryStore, key: str, value: bytes) -> None:
        if "/rank" in key:
            disturb_all(json.loads(value)["port"], strangers)
        store_set(self, key, value)

    monkeypatch.setattr(DirectoryStore, "set", set_and_disturb)
    store = DirectoryStore(tmp_path)
    begin = time.monotonic()
    contexts = each_rank(
        lambda rank: Context.connect(
            Topology.virtual(3, 1), store=store, rank=rank, world_size=3, timeout=60.0
        ),
        3,
    )
    took = time.monotonic() - begin
    assert not [ctx for ctx in contexts if isinstance(ctx, BaseException)], contexts
    assert len(strangers) == 300
    assert took < 20
    add_up(contexts)
    close_all(contexts)
    for stranger in strangers:
        stranger.close()


def test_strangers_after_the_bootstrap_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ports: list[int] = []
    store_set = DirectoryStore.set

    def set_and_note(self: DirectoryStore, key: str, value: bytes) -> None:
        if "/rank" in key:
            ports.append(json.loads(value)["port"])
        store_set(self, key, value)

    monkeypatch.setattr(DirectoryStore, "set", set_and_note)
    with engine_contexts(Topology.from_sizes([2, 1])) as contexts:
        assert len(ports) == 3
        strangers: list[socket.socket] = []
        for port in ports:
            try:
                disturb_all(port, strangers)
            except OSError:  # nobody listens any more: as good
                continue
        add_up(contexts)
        for stranger in strangers:
            stranger.close()
        add_up(contexts)


# -- what strangers can learn ------------------------------------------------------------------------------


def test_a_false_listener_learns_nothing(tmp_path: Path) -> None:
    """Rank 1 dials somebody who took rank 0's place: no token, no proof, and an error that says who."""
    store, heard = DirectoryStore(tmp_path), []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pose() -> None:
            connection, _ = listener.accept()
            connection.settimeout(10)
            heard.append(read_exactly(connection, HELLO_NBYTES))
            connection.sendall(os.urandom(CHALLENGE_NBYTES))
            heard.append(read_exactly(connection, 1000))

        thread = threading.Thread(target=pose, daemon=True)
        thread.start()
        token = os.urandom(16)
        store.set("init1/token", token)

        def take_the_place() -> None:
            entry = json.loads(store.get("init1/rank1", 10))
            store.set("init1/rank0", json.dumps({**entry, "port": listener.getsockname()[1]}).encode())

        publisher = threading.Thread(target=take_the_place, daemon=True)
        publisher.start()
        with pytest.raises(BootstrapError, match=r"rank 0 did not answer the hello of rank 1 with a proof"):
            Context.connect(Topology.virtual(2, 1), store=store, rank=1, world_size=2, timeout=10.0)
        thread.join(10)
    assert heard[0][:4] == b"HYBC"
    assert token not in heard[0]
    assert heard[1] == b""


def test_inside_a_node_no_descriptor_goes_to_strangers_and_none_of_theirs_stays() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with lonely_rank(timeout=60.0, per_node=2) as rank:
        with rank.dial_unix() as first:  # rank 0 has seen this one, so all else it opens is open by now
            assert not rank.join(first, rank.token), "the proof is right, but there is no segment"
        spare = os.memfd_create("stray")
        before = descriptors()
        for nfds in (1, 2, 30):
            with rank.dial_unix() as stranger:
                hello = make_hello(1)
                socket.send_fds(stranger, [hello], [spare] * nfds)
                assert read_exactly(stranger, 1) == b"", "a descriptor in a hello is refused"
            with rank.dial_unix() as stranger:
                stranger.sendall(hello)
                challenge, fds, *_ = socket.recv_fds(stranger, CHALLENGE_NBYTES, 4)
                assert (len(challenge), fds) == (CHALLENGE_NBYTES, [])
                socket.send_fds(stranger, [os.urandom(32)], [spare] * nfds)
                assert socket.recv_fds(stranger, 4, 4)[:2] == (b"", [])
        assert descriptors() == before
        with rank.dial_unix() as proven:
            hello = make_hello(1)
            proven.sendall(hello)
            nonce = read_exactly(proven, CHALLENGE_NBYTES)[:16]
            proof = make_proof(rank.token, hello, nonce, by_dialler=True)
            socket.send_fds(proven, [proof], [spare])
            welcome, fds, *_ = socket.recv_fds(proven, 4, 4)
            assert (welcome, len(fds)) == (b"WLME", 1), "the control: with a proof there is one"
        os.close(fds[0])
        os.close(spare)
    assert isinstance(rank.outcome[0], SharedMemoryError), "an empty segment"
