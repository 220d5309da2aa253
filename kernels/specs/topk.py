"""Block-wise top-k as data: text and settings; ``records.py`` has the sections, docs/payload.md the prose."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hybridcomm.kernels.payload import Codec, SpecError
from hybridcomm.kernels.specs.records import RecordSections

__all__ = ["DEFAULT_BLOCK", "DEFAULT_RATIO", "TopKSpec"]

MIN_BLOCK, MAX_BLOCK = 16, 4096
MIN_VALUE_BITS = 3  # below that the reciprocal of the largest scale is not a normal float
DEFAULT_BLOCK = 1024
DEFAULT_RATIO = 0.01
SIGN_BITS = 2  # the codes -1, 0 and 1
COMPOSITIONS = {"int8": (256, 8), "sign": (4096, SIGN_BITS)}
"""What may follow a ``+``: the default block and the bits of a value."""


@dataclass(frozen=True, kw_only=True)
class TopKSpec(RecordSections):
    """Block-wise top-k with error feedback: of each ``block`` elements the ``k`` largest magnitudes are sent.

    Give ``ratio`` (k = max(1, round(ratio * block))) or ``k``; both only if they agree. A record is 16 bits:
    index in the low log2(block) bits, quantised value (two's complement) in the high ``value_bits``, by
    default all that is left. With ``sign`` a value is -1, 0 or 1 times the block's scale, which then follows
    the mean of what is kept, not the largest of it.

    Raises:
        SpecError: the block is not a power of two in [16, 4096], or ratio, k or value_bits is out of range.
    """

    ratio: float | None = field(default=None, compare=False)
    block: int = DEFAULT_BLOCK
    k: int | None = None
    value_bits: int | None = None
    sign: bool = False

    def __post_init__(self) -> None:
        if self.block < MIN_BLOCK or self.block > MAX_BLOCK or self.block & (self.block - 1):
            raise SpecError(f"block={self.block}: use a power of two from {MIN_BLOCK} to {MAX_BLOCK}")
        ratio = DEFAULT_RATIO if self.ratio is None and self.k is None else self.ratio
        if ratio is not None and not 0.0 < ratio <= 1.0:
            raise SpecError(
                f"ratio={ratio}: use a share above 0 and at most 1, such as 0.01 for one element in a hundred"
            )
        k = self.k if ratio is None else max(1, round(ratio * self.block))
        if self.k is not None and k != self.k:
            raise SpecError(
                f"ratio={ratio} means k={k} of block={self.block}, not k={self.k}: give one of the two"
            )
        if k is None or not 1 <= k <= self.block:
            raise SpecError(f"k={k}: use 1 to block={self.block}")
        widest = 16 - self.index_bits
        given = SIGN_BITS if self.sign else widest
        bits = given if self.value_bits is None else self.value_bits
        if self.sign and bits != SIGN_BITS:
            raise SpecError(f"value_bits={bits}: signs have {SIGN_BITS}")
        if not self.sign and not MIN_VALUE_BITS <= bits <= widest:
            raise SpecError(
                f"value_bits={bits}: block={self.block} leaves {MIN_VALUE_BITS} to {widest} bits of a record"
            )
        for name, value in (
            ("ratio", k / self.block if ratio is None else ratio),
            ("k", k),
            ("value_bits", bits),
        ):
            object.__setattr__(self, name, value)

    codec = Codec.TOPK
    whole_region = False
    seeded = False
    unbiased = False
    summable = False

    @property
    def params(self) -> tuple[int, int, int, int, int]:
        """``(codec, value_bits, variant, block, k)``."""
        block, k, value_bits = self.layout
        return self.codec, value_bits, int(self.sign), block, k

    @property
    def index_bits(self) -> int:
        return self.block.bit_length() - 1

    @property
    def layout(self) -> tuple[int, int, int]:
        """``(block, k, value_bits)``, as plain integers."""
        if self.k is None or self.value_bits is None:
            raise SpecError("unreachable: both are set when the spec is made")
        return self.block, self.k, self.value_bits

    @property
    def qmax(self) -> int:
        """Largest quantised magnitude; the code -qmax-1 is reserved."""
        return (1 << (self.layout[2] - 1)) - 1

    @property
    def max_scale(self) -> int:
        """Largest scale byte an encoder writes (1 is the smallest); larger ones could decode to infinity."""
        return 256 - self.layout[2]

    @property
    def contraction(self) -> float:
        """d in |x - C(x)|^2 <= (1 - d) |x|^2, for every block of any normal input; docs/payload.md derives it.

        Exact values would reach k / block. Each quantised one loses less than 2^(2 - value_bits) of the
        largest, and a sign at most what is not along the mean.
        """
        block, k, value_bits = self.layout
        if self.sign:
            return 8 / 9 * (1 - 2.0**-20) / block
        lost = 4.0 ** (2 - value_bits)
        return k / block / (1 + k * lost / (1 - lost))

    def __str__(self) -> str:
        block, k, bits = self.layout
        return f"topk:{self.ratio:g}" + (f"+sign/b{block}/k{k}" if self.sign else f"/b{block}/k{k}/v{bits}")

    @classmethod
    def parse(cls, text: str) -> TopKSpec:
        """The spec whose ``str`` is ``text``; ``topk`` and ``topk:0.01`` take the defaults for the rest."""
        match = re.fullmatch(
            r"topk(?::([^/+\s]+))?(?:\+(int8|sign))?(?:/b(\d+))?(?:/k(\d+))?(?:/v(\d+))?", text
        )
        try:
            if match is None:
                raise ValueError(text)
            ratio, values, block, k, bits = match.groups()
            share = None if ratio is None else float(ratio)
        except ValueError:
            raise SpecError(
                f"{text!r}: write topk, topk:0.01, topk:0.01+int8, topk:0.01+sign or topk:0.01/b1024/k10/v6"
            ) from None
        default_block, value_bits = COMPOSITIONS.get(values, (DEFAULT_BLOCK, None))
        if bits is not None and value_bits not in (None, int(bits)):
            raise SpecError(f"{text!r}: +{values} has values of {value_bits} bits, not {bits}")
        if share is not None and k is not None:
            size = default_block if block is None else int(block)
            if not abs(share * size - int(k)) <= 1:
                raise SpecError(f"{text!r}: a share of {share} of {size} elements is not {k}")
            if max(1, round(share * size)) != int(k):  # the text has fewer digits than the ratio had
                share = None
        return cls(
            ratio=share,
            block=default_block if block is None else int(block),
            k=None if k is None else int(k),
            value_bits=value_bits if bits is None else int(bits),
            sign=values == "sign",
        )
