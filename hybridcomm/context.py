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
        single_copy: bool = True,
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
        context = cls(
            rank=world.rank,
            topology=member.topology,
            engine=member.engine,
            timeout=timeout,
            chunk_nbytes=chunk_nbytes,
        )
        context._store = world.store  # the rank that hosts a store must not end it while others still read
        context.barrier()
        return context

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
        """Finishes what is queued, says goodbye to the peers, releases everything. Idempotent."""
        self._closer()
        self._running.clear()

    def abort(self) -> None:
        """Makes the running and all later collectives raise `AbortedError`, here and on every other rank."""
        self._engine.abort()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        in_node = "+".join(sorted(set(self.reach().values()))) or "alone"
        return f"Context(rank={self.rank}, topology={self.topology}, in_node={in_node})"
