"""What is built beforehand of ``jit/gtop1.py``: ``gtop1:0.01``, 100 rows of 32."""

from __future__ import annotations

from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.kernels.specs.gtop1 import GTop1Spec
from hybridcomm.kernels.triton.shipped_records import records_family, shipped, threads

__all__ = ["FAMILY", "KERNELS"]


def _constants(spec: GTop1Spec) -> dict[str, int]:
    rows, k, value_bits = spec.layout
    tile = min(16, 1 << (rows.bit_length() - 1))
    return {"ROWS": rows, "K": k, "KP": threads(k), "TILE": tile, "VALUE_BITS": value_bits, "num_warps": 1}


FAMILY = records_family("gtop1", _constants)

KERNELS: tuple[DeviceKernel, ...] = shipped("gtop1", FAMILY, GTop1Spec())
