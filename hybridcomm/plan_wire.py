"""What one rank's part of a plan sends to other nodes, in bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridcomm import compress as compressors
from hybridcomm import policy

if TYPE_CHECKING:
    from hybridcomm.plan import Plan, Step

__all__ = ["sent_nbytes"]


def sent_nbytes(plan: Plan, rank: int) -> int:
    """Bytes that a rank's part sends to other nodes; of a flat call, what a ring through all nodes takes of it."""
    nodes, size = len(plan.topology.nodes), policy.itemsize(plan.dtype)
    if nodes == 1:
        return 0
    node = plan.topology.nodes[plan.topology.node_of(rank)]
    total = 0
    for step in plan.for_rank(rank):
        if step.op == "allreduce_flat":
            total += 2 * (nodes - 1) * step.region.numel * size // nodes // len(node)
        elif step.op == "exchange_reduce_all":
            total += 2 * (nodes - 1) * step.region.numel * size // nodes
        elif step.op == "exchange_reduce":
            total += step.region.numel * size if rank != step.root else 0
        elif step.op == "exchange_gather":
            total += (nodes - 1) * step.region.numel * size if rank == step.root else 0
        elif step.op in ("exchange_payload", "exchange_recompressed"):
            total += _payload_bytes(plan, step, rank, nodes)
    return total


def _payload_bytes(plan: Plan, step: Step, rank: int, nodes: int) -> int:
    codec = compressors.resolve(plan.compressor)
    nbytes = 0 if codec is None else codec.nbytes(step.region.numel)
    if step.op == "exchange_payload":
        return nbytes * (nodes - 1) if step.root == -1 else nbytes * (rank != step.root)
    return nbytes * (nodes - 1) * (rank == step.root)
