"""A rank's NCCL communicators: of all ranks, of its node, and of the owners of each shard.

Made once, in one order on all ranks: the first from an id that goes through the host's context, the others by
splitting it. NCCL's version and what it has beyond 2.18 must be the same everywhere, since plans rely on it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hybridcomm.errors import PlanMismatchError, UnsupportedError

if TYPE_CHECKING:
    from hybridcomm import _C
    from hybridcomm.device_plan import DevicePlan
    from hybridcomm.groups import Grouping
    from hybridcomm.topology import Topology

__all__ = [
    "RANKS_PER_ROOT",
    "check_alike",
    "compare",
    "connect",
    "groups_of",
    "keeps_order",
    "uses_copy_engines",
]

RANKS_PER_ROOT = 128
"""Of a communicator of all ranks: each connects to its root, one by one, before any communicates. torch's process group
takes as many; NCCL itself recommends no number."""

_TEXT_NBYTES = 512
_ID_NBYTES = 128
_COPY_ENGINES = "HYBRIDCOMM_COPY_ENGINES"
_ORDER_SINCE = 22602
"""NCCL's version from which it can order communicators."""


def groups_of(topology: Topology) -> list[list[tuple[int, ...]]]:
    """Rounds of disjoint groups that plans need beside that of all ranks: nodes, then the owners of shards.

    A group's order is that of its communicator: ascending within a node, by node between nodes.
    """
    rounds: list[list[tuple[int, ...]]] = []
    world = tuple(range(topology.world_size))
    wanted = [node for node in topology.nodes if len(node) > 1]
    if len(topology.nodes) > 1:
        wanted += [topology.owners(shard) for shard in range(topology.K)]
    seen = {world}
    for group in wanted:
        if group in seen:
            continue
        seen.add(group)
        for members in rounds:
            if all(not set(group) & set(other) for other in members):
                members.append(group)
                break
        else:
            rounds.append([group])
    return rounds


def roots_of(world_size: int, per_root: int) -> list[int]:
    """The ranks at which the others meet, at most ``per_root`` at each: the first of every share, as NCCL cuts them."""
    count = -(-world_size // per_root)
    return [i * (world_size // count) + min(i, world_size % count) for i in range(count)]


def connect(
    engine: _C.GpuEngine, host: Grouping, *, per_root: int = RANKS_PER_ROOT
) -> dict[tuple[int, ...], int]:
    """The communicators that this rank is in, by their ranks; all ranks call it.

    Raises `BootstrapError`-like errors of the host where a rank does not come, `PeerLostError` where NCCL fails.
    """
    rank, world = host.rank, tuple(range(host.world_size))
    several = "ncclCommInitRankScalable" in engine.newer
    ids = _unique_ids(engine, host, roots_of(len(world), per_root) if several else [0])
    comms = {world: engine.join(unique_ids=ids, rank=rank, size=len(world))}
    for members in groups_of(host.topology):
        own = next((i for i, group in enumerate(members) if rank in group), None)
        key = 0 if own is None else members[own].index(rank)
        made = engine.split(parent=comms[world], color=own, key=key)
        if own is not None:
            comms[members[own]] = made
    return comms


def _unique_ids(engine: _C.GpuEngine, host: Grouping, roots: Sequence[int]) -> bytes:
    """The ids of all roots, in their order: each is made where its root listens."""
    own = np.zeros(_ID_NBYTES, np.uint8)
    if host.rank in roots:
        own[:] = np.frombuffer(engine.unique_id(), np.uint8)
    if len(roots) == 1:
        host.broadcast(own, roots[0])
        return own.tobytes()
    every = np.empty(_ID_NBYTES * host.world_size, np.uint8)
    host.all_gather(every, own)
    return every.reshape(-1, _ID_NBYTES)[list(roots)].tobytes()


def keeps_order(engine: _C.GpuEngine) -> bool:
    """Whether operations of several communicators may run side by side on a device.

    Their kernels wait for peers, and so have to be launched in one order everywhere. NCCL sees to that, by the order of
    the calls, from 2.26.2 on in a process that was started with NCCL_LAUNCH_ORDER_IMPLICIT=1; under a driver older than
    CUDA 12.3 each waits for the end of the one before.
    """
    return engine.nccl_version >= _ORDER_SINCE and os.environ.get("NCCL_LAUNCH_ORDER_IMPLICIT") == "1"


def uses_copy_engines(asked: bool | None) -> bool:
    """``asked``, else what HYBRIDCOMM_COPY_ENGINES says; raises `UnsupportedError` where that is neither 0 nor 1."""
    text = os.environ.get(_COPY_ENGINES, "") or "0"
    if asked is None and text not in ("0", "1"):
        raise UnsupportedError(f"{_COPY_ENGINES}={text}: set it to 1 or 0, alike on every rank")
    return text == "1" if asked is None else asked


def check_alike(host: Grouping, facts: Sequence[str]) -> None:
    """Raises `UnsupportedError`, on all ranks, naming those whose facts are not rank 0's."""
    text = "; ".join(facts).encode()[:_TEXT_NBYTES]
    every = np.empty(_TEXT_NBYTES * host.world_size, np.uint8)
    host.all_gather(every, np.frombuffer(text.ljust(_TEXT_NBYTES, b"\0"), np.uint8).copy())
    said = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in every.reshape(-1, _TEXT_NBYTES)]
    others = [f"rank {rank} has {its}" for rank, its in enumerate(said) if its != said[0]]
    if others:
        raise UnsupportedError(
            f"rank 0 has {said[0]}, but {', '.join(others[:8])}: install the same NCCL, and the same kind of GPU, "
            f"on every rank, and start all with the same NCCL_LAUNCH_ORDER_IMPLICIT and {_COPY_ENGINES}"
        )


def compare(host: Grouping, call: int, name: str, lowered: DevicePlan) -> None:
    """All ranks say what they are about to do as call number ``call``; raises `PlanMismatchError` on all of them where
    one says something else."""
    mine = hashlib.blake2b(f"{call} {name} {lowered.digest}".encode(), digest_size=8).digest()
    every = np.empty(8 * host.world_size, np.uint8)
    host.all_gather(every, np.frombuffer(mine, np.uint8).copy())
    others = [r for r, row in enumerate(every.reshape(-1, 8)) if row.tobytes() != every[:8].tobytes()]
    if others:
        raise PlanMismatchError(
            f"rank {host.rank}: call {call} is {name!r}, {lowered.name}; ranks {others} call something else than rank "
            "0: every rank must issue the same collectives of the same tensors in one order"
        )
