"""Device kernels in Triton; importing this package needs nothing, its modules need torch and triton.

``encoder`` finds the module of a spec: ``encoder(spec).encode(spec, grad, ...)``.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType, ModuleType
from typing import Any

from hybridcomm.kernels.payload import Codec

__all__ = ["MODULES", "encoder"]

MODULES = MappingProxyType(
    {
        Codec.TOPK: "topk",
        Codec.FP16: "codes",
        Codec.BF16: "codes",
        Codec.FP8: "codes",
        Codec.INT8: "codes",
        Codec.INT4: "codes",
        Codec.SIGN1: "codes",
        Codec.GTOP1: "gtop1",
        Codec.RANDK: "randk",
    }
)
"""The module that has a codec's kernels: ``encode`` and ``decode_add``, most also ``reencode``."""


def encoder(spec: Any) -> ModuleType:
    """The module with the kernels of ``spec``, loaded when first asked for.

    Raises:
        NotImplementedError: the codec has no device kernels.
    """
    if spec.codec not in MODULES:
        raise NotImplementedError(f"{spec}: no device kernels")
    return importlib.import_module(f"{__name__}.{MODULES[spec.codec]}")
