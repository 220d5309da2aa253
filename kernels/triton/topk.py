"""What is built beforehand of ``jit/topk.py``: top-k with signs or 8 bits; `cuda.topk` has the default."""

from __future__ import annotations

from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.kernels.specs.topk import TopKSpec
from hybridcomm.kernels.triton.shipped_records import records_family, shipped, threads

__all__ = ["FAMILY", "KERNELS"]


def _constants(spec: TopKSpec) -> dict[str, int]:
    block, k, value_bits = spec.layout
    warps = max(block // 1024, 1)
    return {"BLOCK": block, "K": k, "KP": threads(k, warps), "VALUE_BITS": value_bits, "num_warps": warps}


FAMILY = records_family("topk", _constants)

KERNELS: tuple[DeviceKernel, ...] = (
    *shipped("topk_sign", FAMILY, TopKSpec.parse("topk:0.01+sign")),
    *shipped("topk_int8", FAMILY, TopKSpec.parse("topk:0.01+int8")),
)
