"""The context that the module-level functions of `hybridcomm` use: that of the last `init` in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from hybridcomm import policy
from hybridcomm.context import Context
from hybridcomm.errors import HybridCommError
from hybridcomm.groups import Grouping
from hybridcomm.topology import Topology

if TYPE_CHECKING:
    from hybridcomm.device_context import DeviceContext
    from hybridcomm.point_to_point import PointToPoint

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
    single_copy: bool | None = None,
    device: Any = None,
) -> Context:
    """Joins the job and makes its context the default one.

    Under torchrun or ``python -m hybridcomm.launch`` no argument is needed; with neither it is a world of one
    rank.

    ``topology``: which rank stands on which node; default: by hostname and boot id, or HYBRIDCOMM_NODES
    virtual nodes. ``store``: any ``torch.distributed`` store, with ``rank`` and ``world_size``. ``timeout``:
    s without progress after which a collective (or this call) raises. ``chunk_nbytes``: the unit of
    pipelining, and the size of a shared-memory slot; a rank allocates 4 slots per rank of its node.
    ``single_copy``: whether this rank reads and writes the tensors of others on its node where the kernel lets it
    (process_vm_readv), or bytes are copied twice, through the slots. None: each rank times both, a millisecond
    at start, and takes the faster; `Context.reach` tells which. Results have the same bits.

    ``device``: this rank's GPU as torch names it, such as "cuda" (torch's current one) or its number; it is connected
    to the others' at once, and calls of tensors there go to it. Without it, the first collective of all ranks on such a
    tensor connects its GPU; messages and groups cannot, and raise. `Context.connect_device` has more to choose.

    Raises `BootstrapError` naming the ranks that did not come, `TopologyError` where ranks disagree, and
    `SharedMemoryError` when there is no memory for the slots; with ``device``, as `Context.connect_device`.
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
    if device is not None and str(device) != "cpu":
        try:
            _default.connect_device(device)
        except BaseException:
            shutdown()
            raise
    return _default


def shutdown() -> None:
    """Closes the default context, if there is one, and its GPU."""
    global _default
    context, _default = _default, None
    if context is not None:
        context.close()


def default_context() -> Context:
    """The context of the last `init`; raises `HybridCommError` when there is none."""
    if _default is None:
        raise HybridCommError("no context: call hybridcomm.init() first")
    return _default


def context_of(group: Grouping | DeviceContext | PointToPoint | None) -> Grouping:
    """What ``group=`` means: a group or context, of hosts or of GPUs, which answer alike, or the default context."""
    return default_context() if group is None else cast("Grouping", group)
