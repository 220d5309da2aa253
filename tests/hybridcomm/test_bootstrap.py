"""How ranks meet: who is named when one does not come, what strangers cannot do, what ranks must agree on."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

import hybridcomm
from hybridcomm import bootstrap, policy
from hybridcomm.context import Context
from hybridcomm.errors import (
    BootstrapError,
    HybridCommError,
    SharedMemoryError,
    TopologyError,
    UnsupportedError,
)
from hybridcomm.store import C10dStore, DirectoryStore
from hybridcomm.topology import Topology
from tests.engine_ranks import close_all, connect_each, each_rank, engine_contexts
from tests.rank_processes import ROOT, rank_processes

ADD_UP = r"""
import os, numpy as np, hybridcomm
ctx = hybridcomm.init(timeout=30)
value = np.full(1000, ctx.rank + 1, np.float32)
hybridcomm.allreduce(value)
os.write(1, f"sum {value[0]} of {ctx.world_size} on {ctx.topology}\n".encode())
hybridcomm.shutdown()
"""


@pytest.fixture
def directory() -> Any:
    with tempfile.TemporaryDirectory(prefix="hybridcomm-test-") as path:
        yield path


def connect(
    directory: str, rank: int, world: int, topology: Topology | None = None, **options: Any
) -> Context:
    options.setdefault("timeout", 20.0)
    return Context.connect(topology, store=DirectoryStore(directory), rank=rank, world_size=world, **options)


def add_up(contexts: list[Any]) -> None:
    def body(rank: int) -> None:
        value = np.full(1000, rank + 1, np.float32)
        contexts[rank].allreduce(value)
        assert (value == sum(range(1, len(contexts) + 1))).all()

    assert each_rank(body, len(contexts)) == [None] * len(contexts)


def test_a_peer_that_never_comes_is_named(directory: str) -> None:
    errors = each_rank(lambda r: _error(lambda: connect(directory, (0, 3)[r], 4, timeout=1.0)), 2)
    for error in errors:
        assert isinstance(error, BootstrapError)
        assert "1, 2" in str(error), error


def _error(fn: Any) -> Any:
    try:
        return fn()
    except HybridCommError as error:
        return error


def test_a_peer_that_dies_between_store_and_connection_is_named(directory: str) -> None:
    """Rank 1 publishes where it listens and is gone before anybody has connected."""
    store = DirectoryStore(directory)
    entry = {"host": "127.0.0.1", "port": 1, "node": bootstrap._host_id(), "machine": "m"}
    entry["version"] = bootstrap._WIRE_VERSION
    entry |= {"world_size": 2, "topology": "", "chunk_nbytes": policy.MAX_CHUNK_NBYTES}
    store.set("init1/rank1", json.dumps(entry).encode())
    begin = time.monotonic()
    error = _error(lambda: connect(directory, 0, 2, timeout=1.0))
    assert isinstance(error, BootstrapError)
    assert "rank 1" in str(error)
    assert time.monotonic() - begin < 8


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("world_size", [{"world": 2}, {"world": 3}]),
        ("chunk_nbytes", [{}, {"chunk_nbytes": 65536}]),
        ("topology", [{"topology": Topology.virtual(1, 2)}, {"topology": Topology.virtual(2, 1)}]),
    ],
)
def test_disagreement_is_named_at_once(directory: str, field: str, options: list[dict[str, Any]]) -> None:
    begin = time.monotonic()
    errors = each_rank(
        lambda r: _error(lambda: connect(directory, r, **{"world": 2, "timeout": 60.0, **options[r]})), 2
    )
    assert time.monotonic() - begin < 20
    assert any(isinstance(error, TopologyError) and field in str(error) for error in errors), errors
    assert all(isinstance(error, HybridCommError) for error in errors), errors


def test_ranks_of_different_hosts_cannot_share_a_node(
    monkeypatch: pytest.MonkeyPatch, directory: str
) -> None:
    hosts = threading.local()
    monkeypatch.setattr(bootstrap, "_host_id", lambda: hosts.name)

    def body(rank: int, topology: Topology | None) -> Any:
        hosts.name = f"machine{rank // 2}"
        return _error(lambda: connect(directory, rank, 4, topology))

    errors = each_rank(lambda rank: body(rank, Topology.virtual(1, 4)), 4)
    assert all(isinstance(error, TopologyError) and "machine1" in str(error) for error in errors), errors
    contexts = each_rank(lambda rank: body(rank, None), 4)
    assert [str(ctx.topology) for ctx in contexts] == ["0,1|2,3"] * 4  # detected by host
    add_up(contexts)
    close_all(contexts)


@pytest.mark.parametrize("value", ["0", "3", "-1", "two", "1.5"])
def test_bad_virtual_node_counts(monkeypatch: pytest.MonkeyPatch, directory: str, value: str) -> None:
    monkeypatch.setenv("HYBRIDCOMM_NODES", value)
    errors = each_rank(lambda rank: _error(lambda: connect(directory, rank, 2)), 2)
    assert all(isinstance(error, HybridCommError) and "HYBRIDCOMM_NODES" in str(error) for error in errors)
    assert isinstance(_error(lambda: Context.connect(rank=0, world_size=1)), HybridCommError)


def test_virtual_nodes_from_the_environment(monkeypatch: pytest.MonkeyPatch, directory: str) -> None:
    monkeypatch.setenv("HYBRIDCOMM_NODES", "2")
    contexts = each_rank(lambda rank: connect(directory, rank, 5), 5)
    assert str(contexts[0].topology) == "0,1,2|3,4"
    add_up(contexts)
    close_all(contexts)


def test_a_port_in_use_says_so(monkeypatch: pytest.MonkeyPatch, directory: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("HYBRIDCOMM_PORT", str(taken.getsockname()[1]))
        with pytest.raises(BootstrapError, match=r"cannot listen.*HYBRIDCOMM_PORT"):
            connect(directory, 0, 2, timeout=1.0)
    for bad in ("70000", "-1", "http"):
        monkeypatch.setenv("HYBRIDCOMM_PORT", bad)
        with pytest.raises(BootstrapError, match="HYBRIDCOMM_PORT"):
            connect(directory, 0, 2, timeout=1.0)


def test_stores_of_torch(directory: str) -> None:
    stores: list[Any] = [
        dist.HashStore(),
        dist.FileStore(os.path.join(directory, "file"), 4),
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False),
    ]
    for store in stores:
        contexts = each_rank(
            lambda rank, store=store: Context.connect(
                Topology.virtual(2, 2), store=store, rank=rank, world_size=4, timeout=20.0
            ),
            4,
        )
        add_up(contexts)
        close_all(contexts)


def test_a_lost_store_is_noticed_at_once() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = C10dStore(dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False))
    with pytest.raises(TimeoutError):
        client.get("never", 0.2)
    del server
    begin = time.monotonic()
    with pytest.raises((TimeoutError, RuntimeError)):
        client.get("never", 20.0)
    assert time.monotonic() - begin < 10


def test_init_again_in_the_same_process(directory: str) -> None:
    for _ in range(3):
        contexts = each_rank(lambda rank: connect(directory, rank, 3, Topology.from_sizes([2, 1])), 3)
        add_up(contexts)
        close_all(contexts)


def test_two_contexts_at_once(directory: str) -> None:
    first = each_rank(lambda rank: connect(directory, rank, 3, Topology.from_sizes([2, 1])), 3)
    second = each_rank(lambda rank: connect(directory, rank, 3, Topology.virtual(1, 3)), 3)
    add_up(second)
    add_up(first)
    close_all(first)
    add_up(second)
    close_all(second)


def test_a_world_of_one_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "HYBRIDCOMM_STORE", "HYBRIDCOMM_NODES"):
        monkeypatch.delenv(name, raising=False)
    ctx = hybridcomm.init()
    value = np.arange(5, dtype=np.float32)
    hybridcomm.allreduce(value, op="mean")
    hybridcomm.broadcast(value, 0)
    hybridcomm.barrier()
    assert (ctx.world_size, value.tolist()) == (1, [0, 1, 2, 3, 4])
    hybridcomm.shutdown()


@pytest.mark.parametrize(
    ("rank", "world", "text"),
    [(2, 2, "not in 0..1"), (-1, 2, "not in 0..1"), (0, None, "both"), (None, 2, "both")],
)
def test_bad_rank_and_world_size(
    monkeypatch: pytest.MonkeyPatch, rank: int | None, world: int | None, text: str
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BootstrapError, match=text):
        hybridcomm.init(rank=rank, world_size=world)


def test_bad_options() -> None:
    for options in ({"timeout": 0}, {"timeout": float("nan")}, {"chunk_nbytes": 1000}, {"chunk_nbytes": 0}):
        with pytest.raises(UnsupportedError):
            hybridcomm.init(**options)
    ctx = hybridcomm.init(timeout=float("inf"))
    ctx.barrier()
    hybridcomm.shutdown()


def test_no_store_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "HYBRIDCOMM_STORE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BootstrapError, match="torchrun"):
        hybridcomm.init(rank=0, world_size=2)
    monkeypatch.setenv("HYBRIDCOMM_STORE", "/nonexistent/directory")
    with pytest.raises(BootstrapError, match="does not exist"):
        hybridcomm.init(rank=0, world_size=2)


def test_no_room_for_segments_is_an_error_not_a_signal() -> None:
    """A file-size limit stands for a full memory: posix_fallocate fails the same way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        errors = connect_each(Topology.virtual(1, 2), timeout=2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert all(isinstance(error, SharedMemoryError) and "MiB" in str(error) for error in errors), errors
    with engine_contexts(Topology.virtual(1, 2)) as contexts:  # the control: with room it works
        add_up(contexts)


def test_small_chunks_bound_segments_and_messages() -> None:
    with engine_contexts(Topology.virtual(2, 2), chunk_nbytes=4096) as contexts:
        add_up(contexts)

        def body(rank: int) -> None:
            for compress in (None, "topk:0.1/b64"):
                value = np.full(50_001, rank + 1, np.float32)
                contexts[rank].allreduce(value, compress=compress)
            with pytest.raises(UnsupportedError, match="chunk_nbytes"):
                contexts[rank].allreduce(value, compress="topk:0.1/b4096")

        assert each_rank(body, 4) == [None] * 4


def test_interrupt_ends_a_bootstrap_that_waits() -> None:
    script = "import os, hybridcomm\nprint('go', flush=True)\nhybridcomm.init(timeout=100)"
    for env in ({}, {"HYBRIDCOMM_NODES": "1"}):
        with rank_processes(script, 2, env=env) as job:
            job.processes[1].kill()
            job.wait_for(0, "go")
            time.sleep(0.5)
            begin = time.monotonic()
            job.processes[0].send_signal(2)
            job.wait(20, but=[1])
            assert time.monotonic() - begin < 10
            assert "KeyboardInterrupt" in job.log(0), job.log(0)


def test_torchrun_without_a_process_group(directory: str) -> None:
    """The agent's store is enough, and the keys hold run id and restart count."""
    import subprocess

    script = Path(directory) / "script.py"
    script.write_text(ADD_UP)
    env = {k: v for k, v in os.environ.items() if not k.startswith("HYBRIDCOMM")}
    env |= {"HYBRIDCOMM_NODES": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum 3.0 of 2 on 0|1") == 2, done.stdout


def test_environment_rendezvous_without_torchrun_twice() -> None:
    """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT alone: rank 0 hosts the store, for a second init() as well."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HYBRIDCOMM_STORE": ""}
    with rank_processes(ADD_UP + ADD_UP, 4, nodes=2, env=env) as job:
        assert job.wait(60) == [0] * 4, [job.log(rank) for rank in range(4)]
        for rank in range(4):
            assert job.log(rank).count("sum 10.0 of 4 on 0,1|2,3") == 2


def test_restart_count_is_part_of_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a run that was restarted must not be read by the next one."""
    shared = dist.HashStore()
    monkeypatch.setattr(bootstrap, "_rendezvous_stores", {(0, 2, "h port 1"): shared})
    for name, value in (("MASTER_ADDR", "h"), ("MASTER_PORT", "1"), ("TORCHELASTIC_RUN_ID", "job")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HYBRIDCOMM_STORE", raising=False)
    for restart in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        store = bootstrap.find_world(0, 2).store
        assert store is not None
        with contextlib.suppress(TimeoutError):
            assert store.get("key", 0.1) == restart.encode(), "read another restart's key"
        store.set("key", restart.encode())
