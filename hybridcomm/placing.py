"""Which engine takes a call: the host's, or that of this rank's GPU, by where the call's tensor lies.

A context gets its GPU by `hybridcomm.init` (``device=``) or `Context.connect_device`, or at the first collective of all
its ranks that is given a tensor on one. The latter cannot hang: it begins with an all-gather on the host, which carries
a digest as all calls do, so a rank that brings a tensor of its host, or calls something else, makes it a
`PlanMismatchError` on both, and one that does not come a `StallError`. A message has two ranks only, and a group some,
who cannot connect the others: there it is an error that says so. A group's communicators are made by its members at
their first collective on GPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hybridcomm.errors import DataTypeError, UnsupportedError

if TYPE_CHECKING:
    from hybridcomm.arrays import Array
    from hybridcomm.context import Context
    from hybridcomm.device_context import DeviceContext
    from hybridcomm.groups import Grouping

__all__ = ["gpu_messages", "gpus_of", "on_gpu", "taking", "where"]

_DLPACK_CUDA = 2


def on_gpu(array: Array) -> bool:
    """Whether it lies on a GPU: a tensor of torch's there, or an array of others' that DLPack says so of."""
    if isinstance(array, np.ndarray):
        return False
    of_torch = getattr(array, "is_cuda", None)  # quicker than to ask whether it is a tensor
    if of_torch is not None:
        return bool(of_torch)
    return hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] == _DLPACK_CUDA


def where(array: Array) -> str:
    """The array's GPU, as torch names it."""
    index = getattr(getattr(array, "device", None), "index", None)
    return f"cuda:{array.__dlpack_device__()[1] if index is None else index}"


def taking(group: Grouping, array: Array) -> Grouping:
    """Who runs a collective of such an array: ``group`` itself, or the GPUs of its ranks, which answer alike.

    Raises `DataTypeError` where it lies on a GPU and none is connected that could be by this call.
    """
    if hasattr(group, "provider"):
        return group  # GPUs give on what is not theirs
    home = _home(group)
    if home.device is None:
        if not on_gpu(array):
            return group
        _connect(group, home, array)
    elif not home.device.takes(array):
        return group
    gpus = gpus_of(group)
    if group._batch is not None:
        group._batch.on_gpus(gpus)
    return cast("Grouping", gpus)


def gpus_of(group: Grouping) -> DeviceContext:
    """The GPUs of the ranks of ``group``, whose context has its own; the members' first call of it is collective."""
    home = _home(group)
    device = _connected(home, "this call")
    if group.members is None:
        return device
    ranks = group.members.ranks
    if ranks not in home.device_groups:
        home.device_groups[ranks] = device.group(ranks)
    return home.device_groups[ranks]


def gpu_messages(group: Grouping, array: Array, peer: Any, tag: int) -> tuple[Any, int] | None:
    """(the GPUs that carry a message of such an array, its other end there), or None: the host does.

    Messages of groups are their context's: two ranks alone make no communicator. Raises `UnsupportedError` for a
    ``tag``, and `DataTypeError` where no GPU is connected.
    """
    gpus: Any = group if hasattr(group, "provider") else _home(group).device
    if not (on_gpu(array) if gpus is None else gpus.takes(array)):
        return None
    if gpus is not group:
        gpus = _connected(_home(group), f"a message of a tensor on {where(array)}")
        job_rank, _ = group._meet(peer, 0)
        peer = job_rank
    if peer is None:
        raise UnsupportedError("recv(src=None): name the sender")
    if tag:
        raise UnsupportedError(
            f"tag={tag} of a tensor on a GPU: NCCL has no tags, it matches the messages of two ranks in the order of "
            "their calls; call them in one order on both, or send tensors of the host"
        )
    return gpus, peer


def _home(group: Grouping) -> Context:
    return group._home or cast("Context", group)


def _connected(home: Context, what: str) -> DeviceContext:
    if home.device is None:
        raise DataTypeError(
            f"{what} needs this rank's GPU, and none is connected: call hybridcomm.init(device='cuda') on every rank, "
            "or ctx.connect_device()"
        )
    return home.device


def _connect(group: Grouping, home: Context, array: Array) -> None:
    """At the first tensor on a GPU: possible for all ranks together."""
    if group.members is not None:
        _connected(home, f"a tensor on {where(array)} in a group of {group.world_size} ranks")
    if group._batch is not None:
        _connected(home, f"a tensor on {where(array)} within coalescing()")
    home.connect_device(where(array))
