"""The leaf of the library: payload format, its numpy oracle, host kernels (C++), device kernels (Triton).

Installed as ``hybridcomm.kernels``; nothing here imports the rest of the library, torch or triton. Start with
``payload.py`` (what every payload begins with) and ``specs/`` (the codecs), then ``reference.py`` and
``oracles/`` (what every kernel must compute, bit for bit), then ``host/`` and ``triton/`` (the same, fast).
"""

from hybridcomm.kernels.spec import (
    FLAG_NONFINITE,
    HEADER_NBYTES,
    Codec,
    PayloadFormatError,
    Spec,
    SpecError,
    Status,
    TopKSpec,
    parse,
)

__all__ = [
    "FLAG_NONFINITE",
    "HEADER_NBYTES",
    "Codec",
    "PayloadFormatError",
    "Spec",
    "SpecError",
    "Status",
    "TopKSpec",
    "parse",
]
