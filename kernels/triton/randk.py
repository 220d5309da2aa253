"""What is built beforehand of ``jit/randk.py``: ``randk:0.01``, 32 strata of 100."""

from __future__ import annotations

from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.kernels.specs.randk import RandKSpec
from hybridcomm.kernels.triton.shipped_records import records_family, shipped

__all__ = ["FAMILY", "KERNELS"]


def _constants(spec: RandKSpec) -> dict[str, int]:
    rows, k, value_bits = spec.layout
    return {
        "ROWS": rows,
        "K": k,
        "KP": 32,
        "VALUE_BITS": value_bits,
        "UNBIASED": int(spec.unbiased),
        "num_warps": 1,
    }


FAMILY = records_family("randk", _constants, second="codes_at")

KERNELS: tuple[DeviceKernel, ...] = shipped("randk", FAMILY, RandKSpec())
