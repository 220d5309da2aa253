"""A rank's membership in a group of ranks, and the collectives it takes part in.

A `Context` is what `hybridcomm.init` returns. Contexts are independent: a process may hold several, one per
thread if it likes. The module-level functions of `hybridcomm` use the context of the last `init` in this
process.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from hybridcomm import _C, bootstrap, policy
from hybridcomm.errors import UnsupportedError
from hybridcomm.groups import Grouping

if TYPE_CHECKING:
    from hybridcomm.device_context import DeviceContext
    from hybridcomm.stream_provider import StreamProvider
    from hybridcomm.topology import Topology

__all__ = ["Context"]


class Context(Grouping):
    """One rank of a group; made by `Context.connect` (or `hybridcomm.init`)."""

    def __init__(
        self,
        *,
        rank: int,
        topology: Topology,
        engine: _C.Engine,
        timeout: float,
        chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
    ) -> None:
        super().__init__(rank=rank, topology=topology, engine=engine, chunk_nbytes=chunk_nbytes)
        self.timeout = timeout
        self._store: Any = None
        self._crowded = False
        self._single_copy = False
        self.device: DeviceContext | None = None
        """This rank's GPU, once it is connected."""
        self.device_groups: dict[tuple[int, ...], DeviceContext] = {}  # by ranks, made at first use
        self._closer = weakref.finalize(self, engine.close)  # also at interpreter exit

    @classmethod
    def connect(
        cls,
        topology: Topology | None = None,
        *,
        store: Any = None,
        rank: int | None = None,
        world_size: int | None = None,
        timeout: float = 300.0,
        chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
        single_copy: bool | None = None,
    ) -> Context:
        """Meets the other ranks and connects to them; see `hybridcomm.init` for the arguments."""
        if not timeout > 0:
            raise UnsupportedError(f"timeout={timeout}: must be a positive number of seconds")
        if chunk_nbytes < 4096 or chunk_nbytes % 4096:
            raise UnsupportedError(f"chunk_nbytes={chunk_nbytes}: must be a positive multiple of 4096")
        world = bootstrap.find_world(rank, world_size, store, timeout=timeout)
        member = bootstrap.join(
            world, topology=topology, chunk_nbytes=chunk_nbytes, timeout=timeout, single_copy=single_copy
        )
        return cls._made(world, member, timeout=timeout, chunk_nbytes=chunk_nbytes)

    @classmethod
    def _made(
        cls,
        world: bootstrap.World,
        member: bootstrap.Membership,
        *,
        timeout: float,
        chunk_nbytes: int,
    ) -> Context:
        context = cls(
            rank=world.rank,
            topology=member.topology,
            engine=member.engine,
            timeout=timeout,
            chunk_nbytes=chunk_nbytes,
        )
        context._store = world.store  # the rank that hosts a store must not end it while others still read
        context._crowded, context._single_copy = member.crowded, member.single_copy
        context.barrier()
        return context

    def connect_node(self) -> Context:
        """A context of its own of the ranks on this rank's node, in their order; all of them call it.

        Its collectives stand in a queue of their own: they do not wait behind those of this context, nor of its
        groups. It costs a progress thread and staging memory per rank, and no connections. Close it before this one.
        """
        world = bootstrap.World(rank=self.rank, world_size=self.world_size, store=self._store)
        member = bootstrap.join_node(
            world,
            self.topology,
            chunk_nbytes=self.chunk_nbytes,
            timeout=self.timeout,
            single_copy=self._single_copy,
            crowded=self._crowded,
        )
        local = bootstrap.World(
            rank=self.topology.local_rank(self.rank), world_size=member.topology.world_size, store=self._store
        )
        return self._made(local, member, timeout=self.timeout, chunk_nbytes=self.chunk_nbytes)

    def connect_device(
        self, device: Any = None, *, provider: StreamProvider | None = None, **options: Any
    ) -> DeviceContext:
        """Connects this rank's GPU to the others', which all call it; from then on calls of tensors there go to it.

        ``device``: as torch names it ("cuda:1", 1; default: torch's current one). ``provider`` (instead of it) and
        ``options``: as in `DeviceContext.connect`. It is closed with this context. Raises `UnsupportedError`, on all
        ranks, where one of them has no such device or not what it takes.
        """
        from hybridcomm.device_context import DeviceContext

        if self.device is not None:
            raise UnsupportedError(
                f"this context has a GPU, {self.device.provider.device}, and is of one per rank: close_device() first"
            )
        self.device = DeviceContext.connect(self, provider, device=device, **options)
        return self.device

    def close_device(self) -> None:
        """Finishes what is under way on this rank's GPU, and lets go of it; all ranks call it. Idempotent."""
        device, self.device = self.device, None
        self.device_groups.clear()
        if device is not None:
            device.close()

    def reach(self) -> dict[int, str]:
        """How this rank gets at private tensors of the node's other ranks: "single_copy" (process_vm_readv),
        "same_process" (ranks that are threads) or "staged" (two copies); decided once, at start.
        """
        return dict(self._engine.reach())

    def counters(self) -> dict[str, int]:
        """Bytes since the start: ``wire_tx_bytes`` and ``wire_rx_bytes`` to and from other nodes (message
        headers included, TCP/IP headers not), ``shm_bytes`` written to shared memory; and ``calls``, the
        collectives of all ranks begun.
        """
        return dict(self._engine.counters())

    def close(self) -> None:
        """Finishes what is queued, says goodbye to the peers, releases everything, its GPU first. Idempotent."""
        try:
            self.close_device()
        finally:
            self._closer()
            self._running.clear()

    def abort(self) -> None:
        """Makes the running and all later collectives raise `AbortedError`, here and on every other rank."""
        if self.device is not None:
            self.device.abort()
        self._engine.abort()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        in_node = "+".join(sorted(set(self.reach().values()))) or "alone"
        return f"Context(rank={self.rank}, topology={self.topology}, in_node={in_node})"
