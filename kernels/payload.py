"""What every payload begins with, and what a decoder says about one; docs/payload.md has the prose.

    [ header, 64 bytes ][ sections of the codec ]

Little endian; each section is padded with zeros to a multiple of 16 bytes. The size is a pure function of
(spec, numel), so receivers post their buffers before anything is sent.
"""

from __future__ import annotations

import enum
from typing import Protocol

import numpy as np

__all__ = [
    "ALIGN",
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
    "align",
]

MAGIC = 0x4C504348  # the bytes "HCPL"
VERSION = 1
FLAG_NONFINITE = 1  # the compensated gradient held NaN or Inf: the body is zero and decoding fills with NaN
HEADER_NBYTES = 64
ALIGN = 16


class Codec(enum.IntEnum):
    """Who wrote a payload; the header, the wire format and C++ have the same numbers."""

    NONE = 0
    TOPK = 1
    FP16 = 2
    BF16 = 3
    FP8 = 4
    INT8 = 5
    INT4 = 6
    SIGN1 = 7
    GTOP1 = 8
    GTOPK = 9
    RANDK = 10
    POWERSGD = 11
    CUSTOM = 12


HEADER_DTYPE = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("codec", "u1"),
        ("value_bits", "u1"),
        ("block", "<u4"),
        ("k", "<u4"),
        ("numel", "<u8"),
        ("nbytes", "<u8"),
        ("digest", "<u8"),
        ("flags", "<u4"),
        ("variant", "u1"),
        ("reserved", "u1", (3,)),
        ("checksum", "<u8"),
        ("seed", "<u8"),
    ]
)


class SpecError(ValueError):
    """A text that names no codec, or a setting that the format cannot express."""


class Status(enum.IntEnum):
    """Why a payload was refused, in the order in which decoders look; the C++ enum has the same values."""

    OK = 0
    BAD_PARAMS = 1  # the caller's own parameters
    BAD_HEADER = 2  # magic, version, codec, reserved bytes, unknown flags
    BAD_DIGEST = 3  # made under another plan
    BAD_LAYOUT = 4  # another block, k, value_bits or variant
    BAD_NUMEL = 5
    BAD_NBYTES = 6  # truncated, or a length that the plan does not say
    BAD_CHECKSUM = 7  # bits changed on the way
    BAD_RECORD = 8  # a scale, an index or a code that no encoder writes


class PayloadFormatError(ValueError):
    """A payload was refused; ``status`` says why and ``index`` which one of the list."""

    def __init__(self, status: Status, index: int = 0) -> None:
        super().__init__(f"payload {index} refused: {status.name.lower()}; nothing was added to the output")
        self.status = status
        self.index = index


def align(nbytes: int) -> int:
    """``nbytes`` rounded up to a whole section."""
    return -(-nbytes // ALIGN) * ALIGN


class Spec(Protocol):
    """A codec with its settings; frozen, hashable, and ``spec.parse(str(s)) == s``."""

    @property
    def codec(self) -> Codec: ...

    @property
    def params(self) -> tuple[int, int, int, int, int]:
        """``(codec, value_bits, variant, block, k)``: what the header says and the C++ side takes."""

    @property
    def block(self) -> int:
        """Elements per block; regions begin on multiples of it."""

    @property
    def whole_region(self) -> bool:
        """Whether the selection spans the region, so that cutting a shard into chunks would change it."""

    @property
    def seeded(self) -> bool:
        """Whether encoders draw from a seed, which the header then carries."""

    @property
    def unbiased(self) -> bool:
        """Whether E[C(x)] = x."""

    @property
    def summable(self) -> bool:
        """Whether payloads can be added without decoding."""

    @property
    def contraction(self) -> float | None:
        """d in |x - C(x)|^2 <= (1 - d) |x|^2 for any normal x; None where there is none above 0."""

    def nbytes(self, numel: int) -> int:
        """Bytes of the payload of ``numel`` elements, a multiple of 16."""
