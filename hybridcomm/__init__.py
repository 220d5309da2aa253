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

from typing import TYPE_CHECKING, Any

try:
    from hybridcomm import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        "hybridcomm's compiled engine is not beside this source folder. In a checkout, run `make install` "
        "(or `pip install -e .`), or start Python in another directory to use the installed package. "
        f"[{error}]"
    ) from error

from hybridcomm.compress import Compressor
from hybridcomm.compression_policy import CompressionPolicy, Rule
from hybridcomm.context import Context
from hybridcomm.custom import CustomCompressor
from hybridcomm.default import default_context, init, shutdown
from hybridcomm.errors import HybridCommError
from hybridcomm.groups import Group
from hybridcomm.point_to_point import P2POp, batch_isend_irecv
from hybridcomm.reduction import premul_sum
from hybridcomm.residual import Residual
from hybridcomm.schedule import Schedule
from hybridcomm.topology import Topology
from hybridcomm.verbs import (
    all_gather,
    all_gather_into_tensor,
    all_reduce,
    all_to_all,
    all_to_all_single,
    allreduce,
    barrier,
    broadcast,
    coalescing,
    empty,
    gather,
    irecv,
    isend,
    monitored_barrier,
    new_group,
    recv,
    reduce,
    reduce_scatter,
    reduce_scatter_tensor,
    scatter,
    send,
    split,
)
from hybridcomm.work import Work

if TYPE_CHECKING:
    from hybridcomm.device_context import DeviceContext
    from hybridcomm.reducer import Reducer

__all__ = [
    "CompressionPolicy",
    "Compressor",
    "Context",
    "CustomCompressor",
    "DeviceContext",
    "Group",
    "HybridCommError",
    "P2POp",
    "Reducer",
    "Residual",
    "Rule",
    "Schedule",
    "Topology",
    "Work",
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "allreduce",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "coalescing",
    "default_context",
    "empty",
    "gather",
    "init",
    "irecv",
    "isend",
    "monitored_barrier",
    "new_group",
    "premul_sum",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
    "shutdown",
    "split",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on first use: they are the only parts that need torch.
    if name == "Reducer":
        from hybridcomm.reducer import Reducer

        return Reducer
    if name == "DeviceContext":
        from hybridcomm.device_context import DeviceContext

        return DeviceContext
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
