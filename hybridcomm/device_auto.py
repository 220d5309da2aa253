"""``compress="auto"`` on GPUs: NCCL's own all-reduce, flat, or the route with a compressor between nodes.

Decided as on hosts (`hybridcomm.auto`), from figures that were measured on these devices and links
(`hybridcomm.device_probe`). What is not compressed is NCCL's, whose time is measured and not modelled; the route is its
stages one behind the other, as a call's kernels take a shard whole:

    reduce-scatter in the node, encode, all-gather of payloads (or two stages), decode, all-gather in the node
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybridcomm.auto import Policy
from hybridcomm.device_probe import DeviceFigures, probe_devices
from hybridcomm.policy import DENSE_ALIGN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hybridcomm.compress import Compressor
    from hybridcomm.device_context import DeviceContext
    from hybridcomm.topology import Link

__all__ = ["DevicePolicy", "device_policy"]

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class DevicePolicy(Policy):
    """Decides by ``figures`` between NCCL's flat all-reduce ("dense") and ``candidates``; equal on all ranks."""

    figures: DeviceFigures = field()

    def table(self, sizes: Sequence[int]) -> str:
        """As of hosts, below the figures that were measured."""
        return f"{self.figures}\ndense is NCCL's own all-reduce of all ranks, flat\n{super().table(sizes)}"

    def _cannot_act(self, numel: int, dtype: str, op: str) -> str:
        if why_not := super()._cannot_act(numel, dtype, op):
            return why_not
        return f"kernels take multiples of {DENSE_ALIGN} elements" if numel % DENSE_ALIGN else ""

    def _predict(self, numel: int, codec: Compressor | None, exchange: str = "auto") -> float:
        if codec is None:
            return _line(self.figures.flat, _FP32 * numel)
        topology, kernel = self.figures.topology, self.figures.kernels[str(codec)]
        nodes, ranks = len(topology.nodes), topology.K
        shard = -(-numel // ranks)
        seconds = kernel.call + (kernel.encode + kernel.sum_of(nodes)) * shard
        if ranks > 1:
            seconds += 2 * _line(topology.intra_node, _FP32 * numel * (ranks - 1) / ranks)
        payload = codec.nbytes(shard)
        if exchange != "two_stage":
            return seconds + _line(topology.inter_node, (nodes - 1) * payload)
        slice_ = codec.nbytes(-(-shard // nodes))
        again = (kernel.encode + kernel.sum_of(nodes)) * shard / nodes + kernel.sum_of(1) * shard
        seconds += kernel.call + again - kernel.sum_of(nodes) * shard
        return seconds + 2 * _line(topology.inter_node, (nodes - 1) * slice_)


def _line(link: Link, size: float) -> float:
    return (link.alpha or 0.0) + (link.beta or 0.0) * size


def device_policy(gpus: DeviceContext, requested: str, candidates: tuple[Compressor, ...]) -> DevicePolicy:
    """The first call of a text probes, and so is collective."""
    return DevicePolicy(
        figures=probe_devices(gpus, candidates),
        requested=requested,
        candidates=candidates,
        chunk_nbytes=gpus.host.chunk_nbytes,
    )
