"""Device kernels in Triton.

    jit/           the device code, which alone imports triton
    codes.py ...   what is built beforehand of it, as data (``KERNELS``), and its functions by name (``FAMILY``)
    launch*.py     their host side, which needs torch: checks, buffers, grids, arguments

So what is shipped is launched, and built into a wheel, without Triton. `device_codec` is the way in.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType, ModuleType
from typing import Any

from hybridcomm.kernels.payload import Codec

__all__ = ["MODULES", "declared"]

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
"""The module that has a codec's ``FAMILY`` and ``KERNELS``."""


def declared(spec: Any) -> ModuleType:
    """The module of ``spec``'s kernels, loaded when first asked for.

    Raises:
        NotImplementedError: the codec has no device kernels.
    """
    if spec.codec not in MODULES:
        raise NotImplementedError(f"{spec}: no device kernels")
    return importlib.import_module(f"{__name__}.{MODULES[spec.codec]}")
