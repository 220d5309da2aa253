"""From a text such as ``topk:0.01`` to the spec that it names; the families are in ``specs/``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from hybridcomm.kernels.payload import (
    FLAG_NONFINITE,
    HEADER_DTYPE,
    HEADER_NBYTES,
    MAGIC,
    VERSION,
    Codec,
    PayloadFormatError,
    Spec,
    SpecError,
    Status,
)
from hybridcomm.kernels.specs.quant import CastSpec, Fp8Spec, IntegerSpec, SignSpec
from hybridcomm.kernels.specs.topk import DEFAULT_BLOCK, DEFAULT_RATIO, TopKSpec

__all__ = [
    "CODECS",
    "DEFAULT_BLOCK",
    "DEFAULT_RATIO",
    "FLAG_NONFINITE",
    "HEADER_DTYPE",
    "HEADER_NBYTES",
    "MAGIC",
    "VERSION",
    "Codec",
    "PayloadFormatError",
    "Spec",
    "SpecError",
    "Status",
    "TopKSpec",
    "name_of",
    "parse",
]

CODECS: Mapping[str, Callable[[str], Spec]] = MappingProxyType(
    {
        "topk": TopKSpec.parse,
        "fp16": CastSpec.parse,
        "bf16": CastSpec.parse,
        "fp8": Fp8Spec.parse,
        "int8": IntegerSpec.parse,
        "int4": IntegerSpec.parse,
        "sign1": SignSpec.parse,
    }
)
"""Who reads a text that begins with this name."""


def name_of(text: str) -> str:
    """The codec's name in a text: what stands before the first ``:``, ``/`` or ``+``."""
    return re.split(r"[:/+]", text, maxsplit=1)[0]


def parse(text: str) -> Spec:
    """The spec that ``text`` names, such as ``topk:0.01``; ``parse(str(spec)) == spec``.

    Raises:
        SpecError: an unknown name, or a setting that the format cannot express.
    """
    name = name_of(text)
    if name not in CODECS:
        raise SpecError(f"{text!r}: unknown codec {name!r}; known: {', '.join(CODECS)}")
    return CODECS[name](text)
