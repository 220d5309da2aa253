"""hybridcomm: hierarchical, compressed, overlapped all-reduce for training across slow links.

    import hybridcomm
    hybridcomm.init()                              # under torchrun, SLURM, or python -m hybridcomm.launch
    residual = hybridcomm.Residual()               # what a caller keeps between steps
    hybridcomm.allreduce(gradient, op="mean", compress="topk:0.01", residual=residual)

The route of a gradient, and the file of each step:

    1 ready      its hook fired in backward                            reducer.py
    2 bucket     copied into a flat, padded buffer                     bucket.py
    3 reduce     summed inside the node, a shard per owner             csrc/executor_node.cpp, csrc/reduce.h
    4 compress   shard + residual -> payload, new residual             compress.py, kernels/host/codec.h
    5 exchange   payloads between the shard's owners on other nodes    csrc/executor_wire.cpp, csrc/link.h
    6 decompress payloads -> sum or mean in the shard                  kernels/host/codec.h
    7 gather     shards back to all ranks of the node                  csrc/executor_node.cpp

What runs when is a plan (plan.py), built by collective_plans.py, lowered per rank by lower.py, executed by
csrc/.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

try:
    from hybridcomm import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        "hybridcomm's compiled engine is not beside this source folder. In a checkout, run `make install` "
        "(or `pip install -e .`), or start Python in another directory to use the installed package. "
        f"[{error}]"
    ) from error

from hybridcomm import policy
from hybridcomm.arrays import Array
from hybridcomm.compress import Compress, Compressor
from hybridcomm.context import Context
from hybridcomm.errors import HybridCommError
from hybridcomm.reduction import Op, premul_sum
from hybridcomm.residual import Residual
from hybridcomm.topology import Topology
from hybridcomm.work import Work

if TYPE_CHECKING:
    from hybridcomm.reducer import Reducer

__all__ = [
    "Compressor",
    "Context",
    "HybridCommError",
    "Reducer",
    "Residual",
    "Topology",
    "Work",
    "all_gather",
    "all_reduce",
    "allreduce",
    "barrier",
    "broadcast",
    "default_context",
    "empty",
    "init",
    "premul_sum",
    "reduce_scatter",
    "shutdown",
]

__version__ = "0.1.0"

_default: Context | None = None  # the one piece of module state: the context of the last init()


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


def allreduce(
    t: Array,
    *,
    op: Op = "sum",
    compress: Compress = None,
    residual: Residual | None = None,
    exchange: str = "auto",
    group: Context | None = None,
    async_op: bool = False,
) -> Work | None:
    """Sums or averages ``t`` over all ranks; with ``compress`` but no ``residual`` it is memoryless.

    ``t``: a contiguous CPU tensor (torch or numpy): float32, bfloat16 and float16 (both accumulated in
    float32), float64, int32, int64. ``op``: "sum" or "mean" (floating point only). ``compress``: None (dense)
    or "topk:0.01" (block-wise top 1 %, quantised; float32 only). It acts between nodes; with one node there
    is nothing to compress. "auto": where measured figures say it pays (`hybridcomm.auto`). A mapping such as
    ``{"inter_node": "topk:0.01", "intra_node": "topk:0.1"}`` also compresses what the ranks of a node send to the
    owners of shards, for slow links inside a node; each rank then has a residual of its own for that.
    ``residual``: keeps what compression left out and adds it to the next call (error feedback, Karimireddy et al.
    2019); the law it keeps stands in ``residual.py``. ``exchange``: how payloads are exchanged between nodes.
    "gather": all go to all owners of a shard. "two_stage": those of a slice go to its owner, which adds them and
    sends on the sum, encoded anew; that is fewer bytes from three nodes on, and twice the loss. "auto": by number
    of nodes, payload size and measured links (`hybridcomm.policy.exchange`). ``group``: a context (default: that
    of `init`). ``async_op``: return a `Work` at once; otherwise None is returned when ``t`` holds the result.

    Every rank gets the same bits, whatever the timing. Raises `DataTypeError`, `UnsupportedError` and
    `CompressorError` before anything is sent; `PlanMismatchError` when ranks call different things;
    `PeerLostError` and `StallError` naming the ranks at fault.
    """
    return _context(group).allreduce(
        t, op=op, compress=compress, residual=residual, exchange=exchange, async_op=async_op
    )


all_reduce = allreduce


def broadcast(
    t: Array, root: int = 0, *, group: Context | None = None, async_op: bool = False
) -> Work | None:
    """Copies rank ``root``'s ``t`` into every rank's ``t``."""
    return _context(group).broadcast(t, root, async_op=async_op)


def all_gather(out: Array, t: Array, *, group: Context | None = None, async_op: bool = False) -> Work | None:
    """Gathers every rank's ``t`` into ``out`` (world_size x t.numel() elements, rank order) on all ranks."""
    return _context(group).all_gather(out, t, async_op=async_op)


def reduce_scatter(
    out: Array, t: Array, *, op: Op = "sum", group: Context | None = None, async_op: bool = False
) -> Work | None:
    """Reduces ``t`` (world_size x out.numel() elements) over all ranks; rank r gets part r in ``out``."""
    return _context(group).reduce_scatter(out, t, op=op, async_op=async_op)


def barrier(*, group: Context | None = None) -> None:
    """Returns on no rank before every rank has entered."""
    _context(group).barrier()


def empty(*size: int | Sequence[int], dtype: Any = None, group: Context | None = None) -> Array:
    """An uninitialised tensor in memory shared by the node's ranks, for the fastest collectives.

    ``size`` as in ``torch.empty``. ``dtype``: of torch or NumPy, and so is the result; a name or None (float32)
    gives a torch tensor if torch was imported, else a NumPy array. Give each rank its own; collectives on it, and
    on contiguous parts of it, copy nothing. The memory is whole pages, allocated now, and returned when the last
    view dies. On a node of one rank it is ordinary memory. Raises `SharedMemoryError` when there is no room.
    """
    return _context(group).empty(*size, dtype=dtype)


def _context(group: Context | None) -> Context:
    return default_context() if group is None else group


def __getattr__(name: str) -> Any:
    if name == "Reducer":  # imported on first use: it is the only part that needs torch
        from hybridcomm.reducer import Reducer

        return Reducer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
