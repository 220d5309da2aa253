"""How ranks find each other: a store, an exchange of addresses, one topology.

1. A store: one that is passed in, the launcher's, or torch's rendezvous (torchrun).
2. Rank 0 draws the job's token; every rank opens a listener and publishes where it is.
3. All ranks read all entries, so that they compute the same topology and can name who is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from hybridcomm import _C
from hybridcomm.errors import BootstrapError, TopologyError
from hybridcomm.store import C10dStore, DirectoryStore, PrefixStore, Store
from hybridcomm.topology import Topology

__all__ = ["Membership", "World", "find_world", "join", "join_node"]

_WIRE_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class World:
    """Who this process is, and the store it meets the others through (None: it is alone)."""

    rank: int
    world_size: int
    store: Store | None


@dataclass(frozen=True, kw_only=True)
class Membership:
    """The outcome of the bootstrap: the topology and an engine connected along it."""

    topology: Topology
    engine: _C.Engine
    crowded: bool = False
    """Whether the machine has more ranks than cores, so that who waits does not spin."""
    single_copy: bool = False
    """Whether this rank reads and writes the private tensors of others on its node, where the kernel lets it."""


def find_world(
    rank: int | None = None, world_size: int | None = None, store: Any = None, *, timeout: float = 300.0
) -> World:
    """What the arguments say, else the environment (RANK, WORLD_SIZE and a store), else a world of one.

    ``store`` is a `Store` or any ``torch.distributed`` store. Raises `BootstrapError` where rank and size are
    missing, contradict each other, or no store can be found.
    """
    rank = _from_env("RANK") if rank is None else rank
    world_size = _from_env("WORLD_SIZE") if world_size is None else world_size
    if rank is None and world_size is None:
        rank, world_size = 0, 1
    if rank is None or world_size is None:
        raise BootstrapError("give both rank and world_size (or set both RANK and WORLD_SIZE), or neither")
    if not 0 <= rank < world_size:
        raise BootstrapError(f"rank {rank} is not in 0..{world_size - 1} (world_size={world_size})")
    if store is not None:
        found = store if isinstance(store, DirectoryStore) or not hasattr(store, "wait") else C10dStore(store)
    elif world_size == 1:
        found = None
    else:
        found = _store_from_env(rank, world_size, timeout)
    return World(rank=rank, world_size=world_size, store=found)


def _from_env(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise BootstrapError(f"{name}={text!r}: expected a number") from None


def _store_from_env(rank: int, world_size: int, timeout: float) -> Store:
    directory = os.environ.get("HYBRIDCOMM_STORE")
    if directory:
        return DirectoryStore(directory)
    if "MASTER_ADDR" not in os.environ:
        raise BootstrapError(
            f"rank {rank} of {world_size} has no store to meet the others: start it with torchrun or with "
            "`python -m hybridcomm.launch`, or pass store="
        )
    try:
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    except ImportError as error:
        raise BootstrapError(
            "meeting through MASTER_ADDR needs torch: pip install 'hybridcomm[torch]'"
        ) from error
    where = f"{os.environ['MASTER_ADDR']} port {os.environ.get('MASTER_PORT')}"
    if (rank, world_size, where) not in _rendezvous_stores:
        _rendezvous_stores[rank, world_size, where] = _rendezvous(rank, world_size, timeout, where)
    store = _rendezvous_stores[rank, world_size, where]
    run = os.environ.get("TORCHELASTIC_RUN_ID", "run")
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return C10dStore(PrefixStore(f"hybridcomm/{run}/{restart}", store))


# Rank 0's store is the server: it must outlive every init() of the job, or a rank that comes back sooner than
# rank 0 would meet the old one on its way out.
_rendezvous_stores: dict[tuple[int, int, str], Any] = {}


def _rendezvous(rank: int, world_size: int, timeout: float, where: str) -> Any:
    from torch.distributed.rendezvous import rendezvous

    limit = timedelta(seconds=min(timeout, 1e9))
    try:
        return next(rendezvous("env://", rank, world_size, timeout=limit))[0]
    except (RuntimeError, ValueError) as error:
        raise BootstrapError(
            f"rank {rank}: no rendezvous at {where} (is the port in use? were all ranks started?): {error}"
        ) from error


def join_node(
    world: World, topology: Topology, *, chunk_nbytes: int, timeout: float, single_copy: bool, crowded: bool
) -> Membership:
    """Meets the ranks of this one's node once more, under names of their own in the store; they need no port."""
    node = topology.nodes[topology.node_of(world.rank)]
    store = None if len(node) == 1 or world.store is None else PrefixStore(world.store, f"node{node[0]}")
    return join(
        World(rank=topology.local_rank(world.rank), world_size=len(node), store=store),
        topology=Topology.virtual(1, len(node)),
        chunk_nbytes=chunk_nbytes,
        timeout=timeout,
        single_copy=single_copy,
        crowded=crowded,
        port=0,  # nobody dials it; the job's own may be taken by the context that this one stands beside
    )


def join(
    world: World,
    *,
    topology: Topology | None,
    chunk_nbytes: int,
    timeout: float,
    single_copy: bool | None = None,
    crowded: bool | None = None,
    port: int | None = None,
) -> Membership:
    """Meets the other ranks and connects to those this rank will work with; ``timeout`` in s.

    ``single_copy``: None measures whether it pays on this machine; each rank may decide otherwise. ``crowded``: None
    looks whether those who meet have a core each; ``port``: None asks the environment. Raises
    `BootstrapError` naming the ranks that never came, `TopologyError` where ranks disagree.
    """
    if world.store is None:
        return _alone(topology, chunk_nbytes, timeout)
    host = _own_address()
    listener = _C.Listener(host, _own_port() if port is None else port)
    generation = world.store.count(f"generation/{world.rank}")
    prefix = f"init{generation}"  # every init() of a process meets under a name of its own
    if world.rank == 0:
        world.store.set(f"{prefix}/token", secrets.token_bytes(16))
    entry = {
        "host": host,
        "port": listener.port,
        "node": _host_id(),
        "machine": _boot_id(),
        "version": _WIRE_VERSION,
        "world_size": world.world_size,
        "topology": str(topology) if topology is not None else os.environ.get("HYBRIDCOMM_NODES", ""),
        "chunk_nbytes": chunk_nbytes,
    }
    world.store.set(f"{prefix}/rank{world.rank}", json.dumps(entry).encode())
    entries = _collect(world, prefix, entry, timeout)
    token = world.store.get(f"{prefix}/token", timeout)
    agreed = _agree(world, entries, topology)
    machine, own_node = entry["machine"], agreed.nodes[agreed.node_of(world.rank)]
    endpoints = {peer: (peer, e["host"], e["port"]) for peer, e in enumerate(entries) if peer not in own_node}
    first = _peers(agreed, world.rank)
    if crowded is None:
        crowded = sum(e["machine"] == machine for e in entries) > len(os.sched_getaffinity(0))
    if single_copy is None:
        single_copy = len(own_node) > 1 and _C.single_copy_pays()
    engine = _C.Engine(
        rank=world.rank,
        local_ranks=list(own_node),
        remote_peers=[endpoints[peer] for peer in first],
        others=[endpoint for peer, endpoint in endpoints.items() if peer not in first],
        token=token,
        # Names of sockets can be read by every user of the machine, so they must not tell the token.
        name=f"hybridcomm-{hashlib.blake2b(token, digest_size=12).hexdigest()}",
        slot_nbytes=chunk_nbytes,
        timeout_s=timeout,
        single_copy=single_copy,
        crowded=crowded,
        listener=listener,
    )
    return Membership(topology=agreed, engine=engine, crowded=crowded, single_copy=single_copy)


def _alone(topology: Topology | None, chunk_nbytes: int, timeout: float) -> Membership:
    single = _topology_from_env(World(rank=0, world_size=1, store=None)) or Topology.virtual(1, 1)
    if topology is not None and topology.world_size != 1:
        raise TopologyError(f"topology {topology} has {topology.world_size} ranks, this world has one")
    engine = _C.Engine(
        rank=0,
        local_ranks=[0],
        remote_peers=[],
        token=b"",
        name="hybridcomm-alone",
        slot_nbytes=chunk_nbytes,
        timeout_s=timeout,
        crowded=False,
        listener=_C.Listener("127.0.0.1", 0),
    )
    return Membership(topology=single, engine=engine)


def _collect(world: World, prefix: str, own: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
    deadline = time.monotonic() + timeout
    entries: dict[int, dict[str, Any]] = {}
    for rank in range(world.world_size):
        try:
            assert world.store is not None  # noqa: S101 (join() returned early without a store)
            left = max(deadline - time.monotonic(), 0.05)
            entries[rank] = json.loads(world.store.get(f"{prefix}/rank{rank}", left))
            _compare(world.rank, own, rank, entries[rank])
        except TimeoutError as error:
            missing = [r for r in range(rank, world.world_size) if not _is_there(world, f"{prefix}/rank{r}")]
            raise BootstrapError(
                f"rank {world.rank}: after {timeout:g} s these ranks of {world.world_size} had not come: "
                f"{', '.join(map(str, missing)) or rank}; were they started, with this store and world size?"
            ) from error
    return [entries[rank] for rank in range(world.world_size)]


def _compare(rank: int, own: dict[str, Any], peer: int, other: dict[str, Any]) -> None:
    """At once, not when all have come: a rank with another world size waits for ranks that never will."""
    for field in ("version", "world_size", "topology", "chunk_nbytes"):
        if own[field] != other[field]:
            raise TopologyError(
                f"ranks disagree on {field}: rank {rank} has {own[field]!r}, rank {peer} has {other[field]!r}; "
                "pass the same to init() everywhere"
            )


def _is_there(world: World, key: str) -> bool:
    try:
        return world.store is not None and bool(world.store.get(key, 0.05))
    except TimeoutError:
        return False


def _agree(world: World, entries: list[dict[str, Any]], topology: Topology | None) -> Topology:
    if topology is None:
        topology = _topology_from_env(world) or Topology.from_hosts([entry["node"] for entry in entries])
    if topology.world_size != world.world_size:
        raise TopologyError(
            f"topology {topology} has {topology.world_size} ranks, the world {world.world_size}"
        )
    for node in topology.nodes:
        hosts = {entries[rank]["node"] for rank in node}
        if len(hosts) > 1:
            raise TopologyError(
                f"topology {topology} puts ranks {node} on one node, but they run on {sorted(hosts)} and "
                "share no memory; leave topology to detection, or use more nodes"
            )
    return topology


def _topology_from_env(world: World) -> Topology | None:
    """HYBRIDCOMM_NODES=M: M virtual nodes, as even as they can be."""
    nodes = _from_env("HYBRIDCOMM_NODES")
    if nodes is None:
        return None
    if not 1 <= nodes <= world.world_size:
        raise TopologyError(f"HYBRIDCOMM_NODES={nodes}: must be between 1 and the {world.world_size} ranks")
    return Topology.even(nodes, world.world_size)


def _peers(topology: Topology, rank: int) -> list[int]:
    """The ranks of other nodes that the job's own plans pair this one with: co-owners of a shard.

    Others are connected to when a group's plan, or a message, first needs them.
    """
    peers = {
        peer
        for shard in range(topology.max_local_size)
        if rank in topology.owners(shard)
        for peer in topology.owners(shard)
    }
    return sorted(peers - {rank})


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _host_id() -> str:
    """Same hostname and same boot: the same node, whose ranks share memory."""
    return os.environ.get("HYBRIDCOMM_HOST_ID") or f"{socket.gethostname()}/{_boot_id()}"


def _own_address() -> str:
    """The numeric address other nodes reach this one at: HYBRIDCOMM_HOST, that of HYBRIDCOMM_IFACE, or the
    one that packets to the master leave from.
    """
    host, interface = os.environ.get("HYBRIDCOMM_HOST"), os.environ.get("HYBRIDCOMM_IFACE")
    if host:
        return host
    if interface:
        return _interface_address(interface)
    master = os.environ.get("MASTER_ADDR")
    if os.environ.get("HYBRIDCOMM_STORE") or not master:
        return "127.0.0.1"
    try:
        family, _, _, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: the kernel only picks the route
            return str(probe.getsockname()[0])
    except OSError as error:
        raise BootstrapError(
            f"no route to MASTER_ADDR={master}: {error}; set HYBRIDCOMM_HOST to this node's address"
        ) from error


def _own_port() -> int:
    port = _from_env("HYBRIDCOMM_PORT") or 0
    if not 0 <= port < 1 << 16:
        raise BootstrapError(f"HYBRIDCOMM_PORT={port}: must be between 0 (any free port) and 65535")
    return port


def _interface_address(name: str) -> str:
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            request = struct.pack("256s", name.encode()[:15])
            answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
        except OSError as error:
            known = ", ".join(interface for _, interface in socket.if_nameindex())
            raise BootstrapError(
                f"HYBRIDCOMM_IFACE={name}: no IPv4 address ({error}); there are: {known}"
            ) from error
    return socket.inet_ntoa(answer[20:24])
