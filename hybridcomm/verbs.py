"""The verbs of `hybridcomm`, in the shapes of ``torch.distributed``: names, order of arguments, meaning.

``group`` is a context (default: that of `init`), and ranks are its ranks. ``async_op=True`` returns a `Work` at once;
otherwise None is returned when the result is in place. Arrays are contiguous tensors of torch or NumPy arrays, of any
shape: elements count, 0 of them included. An array with gaps raises `DataTypeError`, whether it is read or written:
pass ``t.contiguous()``, and copy a result back. What is only read may be read-only, and stays as it is. Whatever a
rank passes wrong raises before anything is sent; ranks that disagree get a `PlanMismatchError`.

A tensor on a GPU (torch's, or cupy's and others' by DLPack) goes to this rank's GPU (`hybridcomm.placing`), and all of
a call's tensors lie there. The call puts its work behind what the current stream holds and returns; the host does not
wait. Without ``async_op`` the current stream waits for the result; with it, a `DeviceWork` is returned, whose
``wait()`` makes the stream wait that is current then, and whose ``synchronize()`` the host. All ranks call collectives
on GPUs in one order. Where some pass a tensor on a GPU and others one of the host, each side waits until the context's
timeout; with ``connect_device(debug=True)`` both are told at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from hybridcomm.arrays import Array
from hybridcomm.default import context_of, default_context
from hybridcomm.placing import gpu_messages, gpus_of, taking

if TYPE_CHECKING:
    from hybridcomm.coalesce import Coalescing
    from hybridcomm.compress import ByLink
    from hybridcomm.device_coalesce import DeviceCoalescing
    from hybridcomm.device_context import DeviceContext
    from hybridcomm.device_work import DeviceWork
    from hybridcomm.groups import Group, Grouping
    from hybridcomm.reduction import Op
    from hybridcomm.residual import Residual
    from hybridcomm.work import Work

__all__ = [
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "allreduce",
    "barrier",
    "broadcast",
    "coalescing",
    "empty",
    "gather",
    "irecv",
    "isend",
    "monitored_barrier",
    "new_group",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
    "split",
]


def allreduce(
    t: Array,
    op: Op = "sum",
    group: Grouping | DeviceContext | None = None,
    async_op: bool = False,
    *,
    compress: ByLink = None,
    residual: Residual | None = None,
    exchange: str = "auto",
) -> Work | DeviceWork | None:
    """Reduces ``t`` over all ranks, in place; with ``compress`` but no ``residual`` it is memoryless.

    ``op``: "sum", "avg", "min", "max", "product", "band", "bor", "bxor", `premul_sum` or torch's ``ReduceOp``; which
    dtypes each takes stands in docs/architecture.md (bfloat16 and float16 are accumulated in float32).
    ``compress``: None (dense), "topk:0.01" (block-wise top 1 %, quantised), "gtop1", "gtopk:0.01", "randk:0.01",
    "powersgd:2", "fp16", "bf16", "fp8", "int8", "int4" or "sign1" (one bit); float32 only.
    It acts between nodes; with one node there is nothing to compress. "auto": where
    measured figures say it pays (`hybridcomm.auto`). A mapping such as ``{"inter_node": "topk:0.01", "intra_node":
    "int8"}`` also compresses what the ranks of a node send to the owners of shards, for slow links inside a node.
    ``residual``: keeps what compression left out and adds it to the next call (error feedback, Karimireddy et al.
    2019); the law it keeps stands in ``residual.py``. ``exchange``: how payloads are exchanged between nodes.
    "gather": all go to all owners of a shard. "two_stage": those of a slice go to its owner, which adds them and sends
    on the sum, encoded anew; that is fewer bytes from three nodes on, and a second loss. "auto": by number of nodes,
    payload size and measured links (`hybridcomm.policy.exchange`).

    Every rank gets the same bits, whatever the timing. Raises `DataTypeError`, `UnsupportedError` and
    `CompressorError` before anything is sent; `PlanMismatchError` when ranks call different things;
    `PeerLostError` and `StallError` naming the ranks at fault.
    """
    context = context_of(group)
    plain = compress is None and residual is None and exchange == "auto" and not async_op
    if plain and context.again(t, op):
        return None
    return taking(context, t).allreduce(
        t, op=op, compress=compress, residual=residual, exchange=exchange, async_op=async_op
    )


all_reduce = allreduce


def reduce(
    t: Array,
    dst: int = 0,
    op: Op = "sum",
    group: Grouping | DeviceContext | None = None,
    async_op: bool = False,
) -> Work | DeviceWork | None:
    """Reduces ``t`` over all ranks into rank ``dst``'s ``t``; the others' stay as they are."""
    return taking(context_of(group), t).reduce(t, dst, op=op, async_op=async_op)


def broadcast(
    t: Array, src: int = 0, group: Grouping | DeviceContext | None = None, async_op: bool = False
) -> Work | DeviceWork | None:
    """Copies rank ``src``'s ``t`` into every rank's ``t``."""
    return taking(context_of(group), t).broadcast(t, src, async_op=async_op)


def all_gather(
    out: Sequence[Array] | Array,
    t: Array,
    group: Grouping | DeviceContext | None = None,
    async_op: bool = False,
) -> Work | DeviceWork | None:
    """Copies every rank's ``t`` into ``out[rank]`` on all ranks.

    ``out``: a list of one array per rank (sizes may differ by rank, and are the same on all ranks), or one array as
    for `all_gather_into_tensor`.
    """
    return taking(context_of(group), t).all_gather(out, t, async_op=async_op)


def all_gather_into_tensor(
    out: Array, t: Array, group: Grouping | DeviceContext | None = None, async_op: bool = False
) -> Work | DeviceWork | None:
    """Gathers every rank's ``t`` into ``out`` (world_size x t.numel() elements, by rank) on all ranks.

    ``t`` may be this rank's part of ``out``: then nothing is copied before.
    """
    return taking(context_of(group), out).all_gather_into_tensor(out, t, async_op=async_op)


def reduce_scatter(
    out: Array,
    input_list: Sequence[Array] | Array,
    op: Op = "sum",
    group: Grouping | DeviceContext | None = None,
    async_op: bool = False,
) -> Work | DeviceWork | None:
    """Reduces every rank's ``input_list[r]`` into rank r's ``out``.

    ``input_list``: one array per rank (sizes may differ by rank, and are the same on all ranks), or one array as for
    `reduce_scatter_tensor`.
    """
    return taking(context_of(group), out).reduce_scatter(out, input_list, op=op, async_op=async_op)


def reduce_scatter_tensor(
    out: Array,
    t: Array,
    op: Op = "sum",
    group: Grouping | DeviceContext | None = None,
    async_op: bool = False,
) -> Work | DeviceWork | None:
    """Reduces ``t`` (world_size x out.numel() elements) over all ranks; rank r gets part r in ``out``.

    ``out`` may be this rank's part of ``t``: then nothing is copied before.
    """
    return taking(context_of(group), out).reduce_scatter_tensor(out, t, op=op, async_op=async_op)


def gather(
    t: Array,
    gather_list: Sequence[Array] | None = None,
    dst: int = 0,
    group: Grouping | DeviceContext | None = None,
    async_op: bool = False,
) -> Work | DeviceWork | None:
    """Copies every rank's ``t`` into rank ``dst``'s ``gather_list[rank]``; the other ranks pass no list."""
    return taking(context_of(group), t).gather(t, gather_list, dst, async_op=async_op)


def scatter(
    t: Array,
    scatter_list: Sequence[Array] | None = None,
    src: int = 0,
    group: Grouping | DeviceContext | None = None,
    async_op: bool = False,
) -> Work | DeviceWork | None:
    """Copies rank ``src``'s ``scatter_list[rank]`` into every rank's ``t``; the other ranks pass no list."""
    return taking(context_of(group), t).scatter(t, scatter_list, src, async_op=async_op)


def all_to_all_single(
    out: Array,
    t: Array,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: Grouping | DeviceContext | None = None,
    async_op: bool = False,
) -> Work | DeviceWork | None:
    """Rank r gets the r-th part of ``t``; what this rank gets lies in ``out`` by sender.

    Split sizes count rows (the first dimension), may differ and be 0. None: equal parts; all ranks give some, or none
    does. With them the ranks exchange their sizes first: the call waits for those before it, also with ``async_op``,
    and all ranks see a disagreement alike (`PlanMismatchError`).
    """
    return taking(context_of(group), out).all_to_all_single(
        out, t, output_split_sizes, input_split_sizes, async_op=async_op
    )


def all_to_all(
    out_list: Sequence[Array],
    in_list: Sequence[Array],
    group: Grouping | DeviceContext | None = None,
    async_op: bool = False,
) -> Work | DeviceWork | None:
    """Copies ``in_list[r]`` to rank r, which gets it in its ``out_list`` at this rank's place.

    Sizes may differ, and be 0; they are exchanged first, as in `all_to_all_single`.
    """
    return taking(context_of(group), _first(in_list)).all_to_all(out_list, in_list, async_op=async_op)


def barrier(
    group: Grouping | DeviceContext | None = None, async_op: bool = False
) -> Work | DeviceWork | None:
    """Returns on no rank before every rank has entered."""
    return _hosts(group).barrier(async_op=async_op)


def monitored_barrier(
    group: Grouping | DeviceContext | None = None, timeout: float | None = None, wait_all_ranks: bool = False
) -> None:
    """A barrier whose `StallError` names ranks that did not come, on every rank that did (``error.missing``).

    Every rank reports to rank 0. ``timeout``: s in which nobody new comes (default: the context's; a second at least);
    ``wait_all_ranks``: name all that are missing, not just the first. The context is of no use after that.
    """
    _hosts(group).monitored_barrier(timeout, wait_all_ranks)


def coalescing(
    group: Grouping | DeviceContext | None = None, async_op: bool = False
) -> Coalescing | DeviceCoalescing:
    """A block whose all-reduces (or all_gathers, or reduce_scatters) run as one at its end.

        with hybridcomm.coalescing(async_op=True) as work:
            for t in tensors:
                hybridcomm.all_reduce(t)
        work.wait()

    One block takes one collective, dtype and op, and all ranks make the same calls in it. Tensors of up to 64 KiB share
    a message; larger ones stay where they lie. Tensors on GPUs become one NCCL group. Results are there when the block
    ends, or, with ``async_op``, when its one `Work` (``work.work``) is done. Raises `UnsupportedError` for a call that
    cannot be a part of it.
    """
    return context_of(group).coalescing(async_op=async_op)


def send(t: Array, dst: int, tag: int = 0, *, group: Grouping | DeviceContext | None = None) -> None:
    """Sends ``t`` to rank ``dst`` of ``group``; returns when ``t`` may be changed.

    That is at once for messages up to 64 KiB (1 MiB of them per receiver), else when the receiver has taken it.
    Messages of one (sender, receiver, group, ``tag``) are received in the order of their calls; they wait for no
    collective. Of tensors on GPUs the current stream waits, not the host, and NCCL matches messages of two ranks in the
    order of their calls, whatever their group, so a ``tag`` is refused with `UnsupportedError`; two ranks that send to
    each other at once do it in one `batch_isend_irecv`. Raises `StallError` naming a receiver that did not come,
    `PeerLostError` one that is gone, and `PlanMismatchError` where the receiver expects another size or dtype.
    """
    on_gpus = gpu_messages(context_of(group), t, dst, tag)
    if on_gpus is None:
        context_of(group).send(t, dst, tag)
    else:
        on_gpus[0].isend(t, on_gpus[1]).wait()


def recv(t: Array, src: int | None, tag: int = 0, *, group: Grouping | DeviceContext | None = None) -> int:
    """Receives from rank ``src`` of ``group`` into ``t``, which has the size and dtype that were sent.

    Returns ``src``. Any source (None) is refused with `UnsupportedError`. Other errors as in `send`.
    """
    on_gpus = gpu_messages(context_of(group), t, src, tag)
    if on_gpus is None:
        return context_of(group).recv(t, src, tag)
    on_gpus[0].irecv(t, on_gpus[1]).wait()
    return cast("int", src)


def isend(
    t: Array, dst: int, tag: int = 0, *, group: Grouping | DeviceContext | None = None
) -> Work | DeviceWork:
    """As `send`, but returns at once; ``t`` must stay as it is until the work is done."""
    on_gpus = gpu_messages(context_of(group), t, dst, tag)
    found: Work | DeviceWork = (
        context_of(group).isend(t, dst, tag) if on_gpus is None else on_gpus[0].isend(t, on_gpus[1])
    )
    return found


def irecv(
    t: Array, src: int | None, tag: int = 0, *, group: Grouping | DeviceContext | None = None
) -> Work | DeviceWork:
    """As `recv`, but returns at once; ``t`` holds the message when the work is done."""
    on_gpus = gpu_messages(context_of(group), t, src, tag)
    found: Work | DeviceWork = (
        context_of(group).irecv(t, src, tag) if on_gpus is None else on_gpus[0].irecv(t, on_gpus[1])
    )
    return found


def new_group(ranks: Sequence[int]) -> Group:
    """The group of ``ranks`` of the default context; see `Context.group`. It talks to nobody."""
    return default_context().group(ranks)


def split(color: int | None, key: int = 0, *, group: Grouping | DeviceContext | None = None) -> Group | None:
    """Divides the ranks into a group for each ``color``, ordered by ``key``, then rank; collective.

    ``color=None`` joins no group and gets None. One small all-gather; nothing has to be given back.
    """
    return _hosts(group).split(color, key)


def empty(
    *size: int | Sequence[int],
    dtype: Any = None,
    group: Grouping | DeviceContext | None = None,
    device: Any = None,
) -> Array:
    """An uninitialised tensor in memory shared by the node's ranks, for the fastest collectives.

    ``size`` as in ``torch.empty``. ``dtype``: of torch or NumPy, and so is the result; a name or None (float32)
    gives a torch tensor if torch was imported, else a NumPy array. Give each rank its own; collectives on it, and
    on contiguous parts of it, copy nothing. The memory is whole pages, allocated now, and returned when the last
    view dies. On a node of one rank it is ordinary memory. Raises `SharedMemoryError` when there is no room.

    ``device``: "cuda", or this rank's GPU by name: there instead, in memory that NCCL knows (registered from 2.19 on).
    Raises `DataTypeError` where that GPU is not connected.
    """
    context = context_of(group)
    if device is None or str(device) == "cpu":
        return context.empty(*size, dtype=dtype)
    gpus: Any = context if hasattr(context, "provider") else gpus_of(context)
    gpus.check_here(device)
    return gpus.empty(*size, dtype=dtype)


def _hosts(group: Grouping | DeviceContext | None) -> Grouping:
    """For what hosts do, whoever's tensors a context takes."""
    context = context_of(group)
    return getattr(context, "host", context)


def _first(arrays: Sequence[Array]) -> Array:
    """The one that says where a list lies; None of what is no list, which the host's engine refuses."""
    return arrays[0] if isinstance(arrays, (list, tuple)) and arrays else None
