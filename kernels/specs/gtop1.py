"""gtop1 as data: the largest of each strided group; ``records.py`` has the sections, docs/payload.md the prose."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hybridcomm.kernels.payload import Codec, SpecError
from hybridcomm.kernels.specs.records import RecordSections
from hybridcomm.kernels.specs.topk import DEFAULT_RATIO, MAX_BLOCK, MIN_VALUE_BITS

__all__ = ["GTop1Spec"]

WARP = 32  # groups per block where they fit: a GPU's threads, one group each, read neighbouring elements
MIN_GROUPS = 16  # a whole vector of groups


@dataclass(frozen=True, kw_only=True)
class GTop1Spec(RecordSections):
    """Of each group of ``rows`` elements exactly the largest magnitude is sent: no threshold, no compaction.

    A block is ``rows`` rows of ``k`` elements, and group j is its column j: elements j, j + k, j + 2 k, ... A
    record is 16 bits: row in the low ceil(log2(rows)) bits, quantised value (two's complement) in the high
    ``value_bits``, by default all that is left.

    Raises:
        SpecError: rows outside 2..256, k no multiple of 16, more than 4096 elements, or too many value_bits.
    """

    rows: int = round(1 / DEFAULT_RATIO)
    k: int | None = None
    value_bits: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.rows <= 256:
            raise SpecError(f"groups of {self.rows} elements: use a share from 0.00390625 (1/256) to 0.5")
        k = self.k if self.k is not None else WARP if self.rows * WARP <= MAX_BLOCK else MIN_GROUPS
        if k < MIN_GROUPS or k % MIN_GROUPS or k * self.rows > MAX_BLOCK:
            raise SpecError(
                f"k={k}: use a multiple of {MIN_GROUPS} up to {MAX_BLOCK // self.rows // MIN_GROUPS * MIN_GROUPS}"
            )
        widest = 16 - (self.rows - 1).bit_length()
        bits = widest if self.value_bits is None else self.value_bits
        if not MIN_VALUE_BITS <= bits <= widest:
            raise SpecError(
                f"value_bits={bits}: groups of {self.rows} leave {MIN_VALUE_BITS} to {widest} bits of a record"
            )
        object.__setattr__(self, "k", k)
        object.__setattr__(self, "value_bits", bits)

    codec = Codec.GTOP1
    whole_region = False
    seeded = False
    unbiased = False
    summable = False

    @property
    def layout(self) -> tuple[int, int, int]:
        """``(rows, k, value_bits)``, as plain integers."""
        if self.k is None or self.value_bits is None:
            raise SpecError("unreachable: both are set when the spec is made")
        return self.rows, self.k, self.value_bits

    @property
    def block(self) -> int:
        rows, k, _ = self.layout
        return rows * k

    @property
    def params(self) -> tuple[int, int, int, int, int]:
        """``(codec, value_bits, variant, block, k)``."""
        rows, k, value_bits = self.layout
        return self.codec, value_bits, 0, rows * k, k

    @property
    def contraction(self) -> float:
        """d in |x - C(x)|^2 <= (1 - d) |x|^2, for every block of any normal input: as for top-k with exact 1 / rows."""
        rows, k, value_bits = self.layout
        lost = 4.0 ** (2 - value_bits)
        return 1 / rows / (1 + k * lost / (1 - lost))

    def __str__(self) -> str:
        rows, k, bits = self.layout
        return f"gtop1:{1 / rows:g}/k{k}/v{bits}"

    @classmethod
    def parse(cls, text: str) -> GTop1Spec:
        """The spec whose ``str`` is ``text``; ``gtop1`` and ``gtop1:0.01`` take the defaults for the rest.

        A share is rounded to the nearest 1 / rows.
        """
        match = re.fullmatch(r"gtop1(?::([^/\s]+))?(?:/k(\d+))?(?:/v(\d+))?", text)
        try:
            if match is None:
                raise ValueError(text)
            ratio, k, bits = match.groups()
            share = DEFAULT_RATIO if ratio is None else float(ratio)
            if not 0.0 < share <= 1.0:
                raise ValueError(text)
        except ValueError:
            raise SpecError(
                f"{text!r}: write gtop1, gtop1:0.01 or gtop1:0.01/k32/v9, with a ratio above 0 and at most 0.5"
            ) from None
        return cls(
            rows=min(round(1 / share), 1 << 16),
            k=None if k is None else int(k),
            value_bits=None if bits is None else int(bits),
        )
