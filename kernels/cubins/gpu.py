"""Three GPUs as far as the gate and the roofline page need them: sizes of an SM, rates, bandwidth.

Sources: NVIDIA's architecture papers and data sheets of A100 80GB SXM, H100 SXM and B200; CUDA C++ Programming Guide,
"Compute Capabilities" (limits of an SM) and "Arithmetic Instructions" (results per clock and SM). Clocks are below the
highest boost clocks (1.41, 1.98, 1.965 GHz): what a loaded card holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["GPUS", "LATENCY", "Gpu", "Occupancy", "occupancy"]

LATENCY = 800e-9
"""Seconds from a load to its data, under load: microbenchmarks of idle memory report 350 to 600 ns."""
_WARP = 32


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """``bandwidth``: bytes/s of device memory; ``clock``: Hz; ``issue`` and ``rates``: threads per clock and SM, in all
    and by pipe; ``shared``: bytes per SM for blocks; ``reserved``: bytes that each block costs beside its own, where
    the cubin does not count them.
    """

    name: str
    arch: int
    bandwidth: float
    sms: int
    clock: float
    rates: Mapping[str, int]
    shared: int
    reserved: int
    issue: int = 128
    registers: int = 65536
    warps: int = 64
    blocks: int = 32

    @property
    def in_flight(self) -> float:
        """Bytes per SM that must be on their way for the memory to be kept busy (Little's law)."""
        return self.bandwidth * LATENCY / self.sms


def _rates(fp32: int) -> Mapping[str, int]:
    return MappingProxyType({"alu": 64, "fp32": fp32, "imad": 64, "xu": 16, "lsu": 32})


_GPUS = (
    Gpu(
        name="A100 80GB SXM",
        arch=80,
        bandwidth=2.039e12,
        sms=108,
        clock=1.41e9,
        rates=_rates(64),
        shared=164 * 1024,
        reserved=1024,
    ),
    Gpu(
        name="H100 SXM",
        arch=90,
        bandwidth=3.35e12,
        sms=132,
        clock=1.755e9,
        rates=_rates(128),
        shared=228 * 1024,
        reserved=0,
    ),
    Gpu(
        name="B200",
        arch=100,
        bandwidth=8.0e12,
        sms=148,
        clock=1.85e9,
        rates=_rates(128),
        shared=228 * 1024,
        reserved=0,
    ),
)


GPUS: Mapping[int, Gpu] = MappingProxyType({gpu.arch: gpu for gpu in _GPUS})
"""The GPU that stands for an architecture."""


@dataclass(frozen=True, kw_only=True)
class Occupancy:
    """``blocks`` that an SM holds at once, and the share of its warps that they fill."""

    blocks: int
    share: float


def occupancy(gpu: Gpu, *, registers: int, warps: int, shared: int) -> Occupancy:
    """``registers`` per thread, ``warps`` and bytes of ``shared`` per block. Registers come in 256 per warp."""
    of_warp = -(-registers * _WARP // 256) * 256
    blocks = min(
        gpu.blocks,
        gpu.warps // warps,
        gpu.registers // (of_warp * warps),
        gpu.shared // max(shared + gpu.reserved, 1),
    )
    return Occupancy(blocks=blocks, share=blocks * warps / gpu.warps)
