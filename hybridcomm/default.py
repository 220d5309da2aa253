"""The context that the module-level functions of `hybridcomm` use: that of the last `init` in this process."""

from __future__ import annotations

from typing import Any

from hybridcomm import policy
from hybridcomm.context import Context
from hybridcomm.errors import HybridCommError
from hybridcomm.topology import Topology

__all__ = ["context_of", "default_context", "init", "shutdown"]

_default: Context | None = None  # the one piece of module state


def init(
    topology: Topology | None = None,
    *,
    store: Any = None,
    rank: int | None = None,
    world_size: int | None = None,
    timeout: float = 300.0,
    chunk_nbytes: int = policy.MAX_CHUNK_NBYTES,
    single_copy: bool = True,
) -> Context:
    """Joins the job and makes its context the default one.

    Under torchrun or ``python -m hybridcomm.launch`` no argument is needed; with neither it is a world of one
    rank.

    ``topology``: which rank stands on which node; default: by hostname and boot id, or HYBRIDCOMM_NODES
    virtual nodes. ``store``: any ``torch.distributed`` store, with ``rank`` and ``world_size``. ``timeout``:
    s without progress after which a collective (or this call) raises. ``chunk_nbytes``: the unit of
    pipelining, and the size of a shared-memory slot; a rank allocates 4 slots per rank of its node.
    ``single_copy``: whether ranks of a node read and write each other's tensors where the kernel lets them
    (process_vm_readv); without, or where it does not, bytes are copied twice, through the slots.

    Raises `BootstrapError` naming the ranks that did not come, `TopologyError` where ranks disagree, and
    `SharedMemoryError` when there is no memory for the slots.
    """
    global _default  # noqa: PLW0603
    shutdown()
    _default = Context.connect(
        topology,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        chunk_nbytes=chunk_nbytes,
        single_copy=single_copy,
    )
    return _default


def shutdown() -> None:
    """Closes the default context, if there is one."""
    global _default  # noqa: PLW0603
    if _default is not None:
        _default.close()
        _default = None


def default_context() -> Context:
    """The context of the last `init`; raises `HybridCommError` when there is none."""
    if _default is None:
        raise HybridCommError("no context: call hybridcomm.init() first")
    return _default


def context_of(group: Context | None) -> Context:
    """What ``group=`` means: a context, or the default one."""
    return default_context() if group is None else group
