"""Measures what policy decides by on GPUs: NCCL's own all-reduce, its stages inside and between nodes, and kernels.

1. Each is timed on the device, by a `Stopwatch` that puts an event before it and one behind; hosts wait, for the probe
   alone. What ranks do together counts as long as it takes where it is longest, as on hosts (`hybridcomm.probe`).
2. A line alpha + beta * size is laid through the times of several sizes: alpha from the smallest, beta by the median of
   the slopes between all pairs (Theil 1950, Sen 1968). The largest sizes are left out where links are slow.
3. Kernels are those that calls launch, on payloads that they made themselves, of two nodes and of four.
4. Rank 0's figures are broadcast: a policy that reads them answers alike on all ranks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridcomm import collective_plans, device_comms
from hybridcomm.cost import KernelCost
from hybridcomm.device_draws import of_call
from hybridcomm.device_plan import COLLECTIVES, START, Buffer, DevicePlan, Operation, Touch, nccl_type
from hybridcomm.errors import UnsupportedError
from hybridcomm.lower_device import Places, lower_device
from hybridcomm.policy import DENSE_ALIGN
from hybridcomm.probe import Figures
from hybridcomm.topology import Link, Topology

if TYPE_CHECKING:
    import torch

    from hybridcomm.compress import Compressor
    from hybridcomm.device_context import DeviceContext

__all__ = ["DeviceFigures", "Stopwatch", "fit_line", "probe_devices"]

Stopwatch = Callable[[Callable[[], object], str, int], float]
"""(call, what it is, its bytes or elements) -> s that the device takes for what the call puts on the current stream."""

SIZES = (1 << 12, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
"""Bytes of a tensor, multiples of what nodes and ranks divide it into; the first tells alpha."""
KERNEL_SIZES = (1 << 16, 1 << 22)
"""Elements."""
_ENOUGH = 0.1  # s of a call behind which no larger one is timed
_ROUNDS = 5
_PAYLOADS = (2, 4)


@dataclass(frozen=True, kw_only=True)
class DeviceFigures(Figures):
    """Measured figures, equal on all ranks.

    ``flat``: NCCL's all-reduce of all ranks, by bytes of the tensor. ``topology``: links as stages take them:
    ``intra_node`` of a reduce-scatter or an all-gather in all nodes at once, by bytes that a rank receives,
    ``inter_node`` of an all-gather between the owners of every shard at once, likewise. ``kernels`` as on hosts, with
    what launches take in ``call``.
    """

    flat: Link

    def __str__(self) -> str:
        alpha, beta = self.flat.alpha or 0.0, self.flat.beta or 0.0
        flat = f"flat, by NCCL: {alpha * 1e6:.1f} us + {beta * 1e9:.4f} ns/B; kernels timed on the device"
        return f"{flat}\n{super().__str__()}"


def fit_line(sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """alpha (s) and beta (s per unit of size) of times of ascending sizes."""
    pairs = combinations(zip(sizes, seconds, strict=True), 2)
    slopes = [(later[1] - first[1]) / (later[0] - first[0]) for first, later in pairs]
    beta = max(statistics.median(slopes), 0.0) if slopes else 0.0
    return Link(alpha=max(seconds[0] - beta * sizes[0], 0.0), beta=beta)


def probe_devices(gpus: DeviceContext, codecs: Sequence[Compressor]) -> DeviceFigures:
    """Measures ``gpus``; a second or two, and less where links are fast.

    Collective: all ranks call it alike, with nothing else in flight, in no capture, and get the same figures. Raises
    `UnsupportedError` for a codec that has no kernels.
    """
    if gpus._engine.capturing(gpus.provider.stream()):
        raise UnsupportedError("compress='auto' measures at its first call: make one before the capture")
    topology, probe = gpus.topology, _Probe(gpus)
    kernels = {str(codec): probe.kernels(codec) for codec in codecs}
    flat = probe.line("all_reduce", probe.flat, lambda nbytes: nbytes)
    near = far = Link()
    if topology.K > 1:
        share = (topology.K - 1) / topology.K
        near = probe.line("node", probe.in_nodes, lambda nbytes: nbytes * share)
        near = Link(alpha=(near.alpha or 0.0) / 2, beta=(near.beta or 0.0) / 2)  # of two collectives
    if len(topology.nodes) > 1:
        others = len(topology.nodes) - 1
        far = probe.line("between", probe.between_nodes, lambda nbytes: nbytes * others / (others + 1))
    return DeviceFigures(
        topology=replace(topology, intra_node=near, inter_node=far), kernels=kernels, flat=flat
    )


_Built = tuple[list[Operation], list[Any]]  # and the memory that they touch


class _Probe:
    """Operations of one rank, timed together with the others'."""

    def __init__(self, gpus: DeviceContext) -> None:
        self.gpus, self.host, self.rank, self.topology = gpus, gpus.host, gpus.rank, gpus.topology

    # -- links ---------------------------------------------------------------------------------------------

    def line(self, what: str, build: Callable[[int], _Built], unit: Callable[[int], float]) -> Link:
        sizes, seconds = [], []
        for nbytes in SIZES:
            operations, tensors = build(nbytes)
            seconds.append(self._together(operations, tensors, what, nbytes))
            sizes.append(unit(nbytes))
            if seconds[-1] > _ENOUGH and len(sizes) > 1:
                break
        return fit_line(sizes, seconds)

    def flat(self, nbytes: int) -> _Built:
        tensor = self._zeros(nbytes)
        return [self._op("all_reduce", tuple(range(self.host.world_size)), tensor, tensor, nbytes // 4)], [
            tensor
        ]

    def in_nodes(self, nbytes: int) -> _Built:
        """A reduce-scatter and an all-gather, in place; nothing on a rank that is alone on its node."""
        node = self.topology.nodes[self.topology.node_of(self.rank)]
        if len(node) == 1:
            return [], []
        tensor, count = self._zeros(nbytes), nbytes // 4 // self.topology.K
        own = tensor[4 * count * node.index(self.rank) :][: 4 * count]
        whole = tensor[: 4 * count * len(node)]
        return [
            self._op("reduce_scatter", node, whole, own, count),
            self._op("all_gather", node, own, whole, count),
        ], [tensor]

    def between_nodes(self, nbytes: int) -> _Built:
        """Of each shard that this rank owns, an all-gather of an equal part from each owner."""
        ops, tensors, part = [], [], nbytes // len(self.topology.nodes)
        for shard in range(self.topology.K):
            owners = self.topology.owners(shard)
            if self.rank in owners:
                whole = self._zeros(part * len(owners))
                own = whole[part * owners.index(self.rank) :][:part]
                ops.append(self._op("all_gather", owners, own, whole, part, dtype="uint8"))
                tensors.append(whole)
        return ops, tensors

    def _zeros(self, nbytes: int) -> torch.Tensor:
        tensor = self.gpus.provider.empty(nbytes)
        self.gpus.provider.zero(tensor)
        return tensor

    def _op(
        self,
        kind: str,
        group: tuple[int, ...],
        source: torch.Tensor,
        target: torch.Tensor,
        count: int,
        dtype: str = "float32",
    ) -> Operation:
        begin, written = ((t.data_ptr(), t.data_ptr() + t.numel()) for t in (source, target))
        touches = (
            (Touch(*written, True),) if begin == written else (Touch(*begin, False), Touch(*written, True))
        )
        return Operation(
            kind=kind,
            word="exchange",
            stream="inter",
            step=0,
            touches=touches,
            after=(START,),
            source=begin[0],
            target=written[0],
            count=count,
            dtype=dtype,
            comm=self.gpus._comms[group],
        )

    # -- kernels -------------------------------------------------------------------------------------------

    def kernels(self, codec: Compressor) -> KernelCost:
        """s per element of the kernels that calls launch, and of a call's launches."""
        lines = {}
        for nodes in _PAYLOADS:
            times = [self._codec(codec, nodes, numel) for numel in KERNEL_SIZES]
            lines[nodes] = [fit_line(KERNEL_SIZES, each) for each in zip(*times, strict=True)]
        few, many = (lines[nodes] for nodes in _PAYLOADS)
        decode = max((_beta(many[1]) - _beta(few[1])) / (_PAYLOADS[1] - _PAYLOADS[0]), 0.0)
        figures = self._agreed(
            [
                _beta(few[0]),
                max(_beta(few[1]) - _PAYLOADS[0] * decode, 0.0),
                decode,
                (few[0].alpha or 0.0) + (few[1].alpha or 0.0),
            ]
        )
        return KernelCost(encode=figures[0], clear=figures[1], decode=figures[2], call=figures[3])

    def _codec(self, codec: Compressor, nodes: int, numel: int) -> tuple[float, float]:
        """s to encode a region, and to decode the payloads of so many nodes."""
        from hybridcomm.device_codec import DevicePayloads
        from hybridcomm.kernels.cubins.load import find

        provider, arch = self.gpus.provider, self.gpus._engine.compute_capability
        topology, align = Topology.virtual(nodes, 1), codec.block * DENSE_ALIGN
        whole = None if codec.spec.seeded else -(-numel // align) * align  # as calls are planned
        plan = collective_plans.allreduce(
            topology, numel, compressor=codec, exchange="gather", chunk_elems=whole
        )
        tensor, *pair = (self._zeros(4 * numel).view(_float32()) for _ in range(3))
        made = DevicePayloads(
            plan, 0, codec, tensor, (pair[0], pair[1]), memory=provider, find=lambda name: find(name, arch)
        )
        groups = [
            tuple(range(nodes)),
            *(group for round_ in device_comms.groups_of(topology) for group in round_),
        ]
        places = Places(tensor=Buffer("tensor", tensor.data_ptr(), 4 * numel), comms=dict.fromkeys(groups, 0))
        lowered, kept = lower_device(plan, 0, places, made), [tensor, *pair, *made.kept]
        if lowered.draws is not None:
            lowered, headers = of_call(lowered, 1, provider, provider.stream())
            kept.append(headers)
        parts = {
            word: [op for op in lowered.operations if op.word == word and op.kind not in COLLECTIVES]
            for word in ("compress", "decompress")
        }
        encode = self._alone(parts["compress"], kept, f"{codec} encode", numel)
        steps = [step for step in plan.for_rank(0) if step.op == "compress"]
        copies = [_copy(made.place(s, 0), made.place(s, rank)) for s in steps for rank in range(1, nodes)]
        self._alone(copies, kept, "copy", numel)
        return encode, self._alone(parts["decompress"], kept, f"{codec} decode {nodes}", numel)

    # -- time ----------------------------------------------------------------------------------------------

    def _alone(self, operations: Sequence[Operation], kept: list[Any], what: str, size: int) -> float:
        """Median s, on this rank."""
        call = self._call(operations, kept, what)
        times = [self.gpus.stopwatch(call, what, size) for _ in range(_ROUNDS + 1)]
        return statistics.median(times[1:])

    def _together(self, operations: Sequence[Operation], kept: list[Any], what: str, size: int) -> float:
        """Median s on the rank where it is longest."""
        call, times = self._call(operations, kept, what), []
        for _ in range(_ROUNDS + 1):
            self.host.barrier()
            times.append(self.gpus.stopwatch(call, what, size))
        every = np.zeros(self.host.world_size)
        self.host.all_gather_into_tensor(every, np.array([statistics.median(times[1:])]))
        return self._agreed([float(every.max())])[0]

    def _call(self, operations: Sequence[Operation], kept: list[Any], what: str) -> Callable[[], object]:
        """What runs the operations one behind the other, behind the current stream, which then waits."""
        own = tuple(replace(op, after=(START,)) for op in operations)
        buffers = tuple(
            Buffer(f"{i}", t.data_ptr(), t.numel() * t.element_size()) for i, t in enumerate(kept)
        )
        plan = DevicePlan(
            name=f"rank {self.rank}: probing {what}",
            digest=0,
            operations=own,
            tail=len(own),
            buffers=buffers,
        )
        program = plan.program(self.gpus._engine, self.gpus._streams, nccl_type)
        return lambda: self.gpus._start((program, plan, kept), [], False, None, f"probing {what}")

    def _agreed(self, values: Sequence[float]) -> list[float]:
        """Rank 0's, on all ranks."""
        figures = np.array(values, np.float64)
        self.host.broadcast(figures, 0)
        return [float(value) for value in figures]


def _beta(link: Link) -> float:
    return link.beta or 0.0


def _copy(source: Buffer, target: Buffer) -> Operation:
    return Operation(
        kind="copy",
        word="compress",
        stream="codec",
        step=0,
        touches=(Touch(source.address, source.end, False), Touch(target.address, target.end, True)),
        source=source.address,
        target=target.address,
        count=source.nbytes,
    )


def _float32() -> Any:
    import torch

    return torch.float32
