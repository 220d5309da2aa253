"""What an all-reduce should take on nodes of A100s: figures with their sources, and each step of the route from them.

1. `Cluster` holds the figures that are not ours: NCCL's rates and latencies, the way out of a node.
2. `kernel_cost`: a codec's kernels, from the roofline of their machine code.
3. `route`: the steps of one of our plans one after the other, nothing overlapped.
4. `flat`: NCCL's dense all-reduce of all ranks in one, as its own cost model has it.

Nothing is measured here. What overlaps, and what ``compress="auto"`` makes of it, is left to `hybridcomm.cost` and
`hybridcomm.auto`, which get the same figures (`Cluster.topology`, `kernel_cost`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log2

from hybridcomm.compress import Compressor
from hybridcomm.cost import KernelCost
from hybridcomm.kernels.cubins import roof
from hybridcomm.kernels.cubins.gpu import GPUS
from hybridcomm.kernels.cubins.manifest import Build, Manifest
from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.plan import Plan
from hybridcomm.topology import Link, Topology

__all__ = ["ARCH", "Cluster", "Flat", "Stages", "flat", "kernel_cost", "line_rate", "route"]

ARCH = 80
ENCODE_LAUNCHES = 4  # header, zeros, the encoder, the pass that withdraws what is not finite
DECODE_LAUNCHES = 2  # zeros, the decoder
_FP32 = 4
_LONG = 1 << 24  # elements: a payload's header is nothing beside it


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Figures in bytes/s and s; `predicted_steps.ASSUMPTIONS` says where each is from."""

    nodes: int = 8
    per_node: int = 8
    nvlink: float = 230e9
    share: float = 0.96  # of a link's line rate
    tree_share: float = 0.92  # of that, with trees
    base: float = 8.4e-6
    ring_hop: float = 3.4e-6
    tree_hop: float = 4.0e-6
    net_hop: float = 14.0e-6
    launch: float = 2.5e-6

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    def topology(self, gbit: float) -> Topology:
        """With links as `hybridcomm.cost` takes them; ``gbit``: line rate of a node's way out, in Gbit/s."""
        inside = Link(alpha=self.base + (self.per_node - 1) * self.ring_hop, beta=1 / self.nvlink)
        between = Link(alpha=self.base + self.net_hop, beta=1 / (line_rate(gbit) * self.share))
        bare = Topology.virtual(self.nodes, self.per_node)
        return replace(bare, intra_node=inside, inter_node=between)


def line_rate(gbit: float) -> float:
    """Bytes/s."""
    return gbit * 1e9 / 8


# -- kernels -----------------------------------------------------------------------------------------------


def _found(manifest: Manifest, name: str) -> tuple[DeviceKernel, Build]:
    for entry in manifest.entries:
        if entry.kernel.name == name:
            return entry.kernel, next(build for build in entry.builds if build.arch == ARCH)
    raise LookupError(f"no kernel {name} in the manifest")


def _decode(manifest: Manifest, codec: Compressor, payloads: int) -> float:
    """s per element to write the sum of so many payloads where there was something else."""
    name = str(codec).partition(":")[0].partition("/")[0]
    kernel, build = _found(manifest, f"{name}_decode")
    floats, gpu = roof.streamed(kernel, build), GPUS[ARCH]
    each = codec.nbytes(_LONG) / _LONG
    counted = round((kernel.budget.nbytes / roof.OVERHEAD - floats) / each)  # payloads that its budget is for
    nbytes, instructions = roof.OVERHEAD * each, sum(build.figures.looped.values())
    if name == "topk":  # changes what its records name, here and there
        adding = _found(manifest, "topk_decode_add")
        nbytes, instructions = adding[0].budget.nbytes, roof.work(*adding)["issue"]
    more = payloads - counted
    zeros = _FP32 / (gpu.bandwidth * roof.DRAM) if floats > _FP32 else 0.0  # it adds to what it reads
    return (
        zeros + 1 / roof.predict(kernel, build, nbytes=more * nbytes, instructions=more * instructions).rate
    )


def kernel_cost(manifest: Manifest, codec: Compressor, cluster: Cluster, chunk: int) -> KernelCost:
    """Of fp32 gradients and residuals, in chunks of ``chunk`` elements, each of which launches its kernels anew.

    `KernelCost` is linear in payloads: it is exact for one and for one of each node, which is what plans decode.
    """
    name = str(codec).partition(":")[0].partition("/")[0]
    encode = 1 / roof.predict(*_found(manifest, f"{name}_encode_fp32_fp32")).rate
    one, every = (_decode(manifest, codec, payloads) for payloads in (1, cluster.nodes))
    decode = (every - one) / (cluster.nodes - 1)
    launch = cluster.launch / chunk
    return KernelCost(
        encode=encode + ENCODE_LAUNCHES * launch,
        clear=one - decode + DECODE_LAUNCHES * launch,
        decode=decode,
    )


# -- routes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stages:
    """s of the steps of a route that take time; ``wire``: bytes that a node sends."""

    wire: float
    reduce: float
    compress: float
    exchange: float
    decompress: float
    gather: float

    @property
    def total(self) -> float:
        """One after the other."""
        return self.reduce + self.compress + self.exchange + self.decompress + self.gather


def route(
    plan: Plan, codec: Compressor | None, topology: Topology, kernels: Mapping[str, KernelCost], scale: int
) -> Stages:
    """The steps of ``plan`` of ``scale`` times its elements.

    Bytes are the plan's own. An exchange in two stages holds the second encoding. Each link's alpha counts once a
    step, as chunks follow each other.
    """
    near, far = topology.intra_node, topology.inter_node
    if near.alpha is None or near.beta is None or far.alpha is None or far.beta is None:
        raise ValueError("the topology's links need figures")
    nodes, numel = len(topology.nodes), plan.numel * scale
    wire = scale * plan.wire_nbytes(codec.nbytes if codec else None) / nodes
    hop = near.alpha + (topology.K - 1) / topology.K * numel * _FP32 * near.beta
    hops = 1 if plan.exchange == "gather" else 2
    exchange, shard = hops * far.alpha + wire * far.beta, numel / topology.K
    encode = decode = 0.0
    if codec is not None:
        cost = kernels[str(codec)]
        encode, decode = cost.encode * shard, cost.sum_of(nodes) * shard
        if plan.exchange == "two_stage":
            exchange += (cost.sum_of(nodes) + cost.encode) * shard / nodes
            decode = cost.sum_of(1) * shard
    return Stages(wire=wire, reduce=hop, compress=encode, exchange=exchange, decompress=decode, gather=hop)


@dataclass(frozen=True, kw_only=True)
class Flat:
    """``how``: ring or tree, whichever takes less."""

    how: str
    wire: float
    seconds: float


def flat(cluster: Cluster, gbit: float, nbytes: float) -> Flat:
    """NCCL's all-reduce of all ranks, by the ring or the double binary tree, pipelined: its slowest link sets the rate.

    Both send about two buckets out of each node; a ring has more hops than a tree, and a higher rate.
    """
    rate, ranks = line_rate(gbit) * cluster.share, cluster.ranks
    steps, outside = 2 * (ranks - 1), 2 * (cluster.nodes - 1)
    of_ring = steps / ranks * nbytes
    hops = (steps - outside) * cluster.ring_hop + outside * cluster.net_hop
    ring = Flat(how="ring", wire=of_ring, seconds=cluster.base + hops + of_ring / min(rate, cluster.nvlink))
    hops = 2 * ((cluster.per_node - 1) * cluster.tree_hop + log2(cluster.nodes) * cluster.net_hop)
    of_tree = 2 * nbytes
    slowest = cluster.tree_share * min(rate, cluster.nvlink)
    tree = Flat(how="tree", wire=of_tree, seconds=cluster.base + hops + of_tree / slowest)
    return min(ring, tree, key=lambda way: way.seconds)
