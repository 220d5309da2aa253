"""What is built beforehand of ``jit/codes.py``: codecs with a code of fixed width per element."""

from __future__ import annotations

from hybridcomm.kernels.payload import Codec
from hybridcomm.kernels.specs.quant import Fp8Spec, QuantSpec
from hybridcomm.kernels.triton.family import family
from hybridcomm.kernels.triton.shipped import shipped

__all__ = ["FAMILY", "KERNELS"]

_PLACE = ("numel", "first", "codes")
_CASTS = {Codec.FP16: 10, Codec.BF16: 7}


def _constants(spec: QuantSpec) -> dict[str, int]:
    mantissa = spec.mantissa if isinstance(spec, Fp8Spec) else _CASTS.get(spec.codec, 0)
    return {"GROUP": spec.block, "BITS": spec.value_bits, "MANTISSA": mantissa}


FAMILY = family(
    "codes",
    _constants,
    {
        "encode": ("grad", "e_in", "e_out", "payload", *_PLACE, "decay"),
        "reencode": (
            *("payloads", "e_in", "e_out", "payload", "count", "stride"),
            *(*_PLACE, "weight", "decay"),
        ),
        "decode": ("payloads", "out", "count", "stride", *_PLACE, "weight"),
    },
)

KERNELS = shipped(FAMILY, ("int8", "int4", "fp8", "sign1", "fp16", "bf16"))
