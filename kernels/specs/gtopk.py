"""gtopk as data: the exact top-k of a whole region; docs/payload.md has the prose.

[ scales, one u8 per 16 records ][ records, u16 each ][ counts per block, unary ]
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hybridcomm.kernels.payload import HEADER_NBYTES, Codec, SpecError, align
from hybridcomm.kernels.specs.topk import TopKSpec

__all__ = ["GROUP", "GTopKSpec"]

GROUP = 16
"""Records that share a scale."""


@dataclass(frozen=True, kw_only=True)
class GTopKSpec:
    """The ``k / block`` largest magnitudes of the region, wherever they lie; ties to the lowest index.

    ``topk`` says the share and how 16 bits are split: index within a block, quantised value. How many records a
    block has is told in unary, so the size is static although the counts are not.

    Raises:
        SpecError: as TopKSpec, or signs.
    """

    topk: TopKSpec = field(default_factory=TopKSpec)

    def __post_init__(self) -> None:
        if self.topk.sign:
            raise SpecError("gtopk: signs are for topk; write gtopk:0.01")

    codec = Codec.GTOPK
    whole_region = True
    seeded = False
    unbiased = False
    summable = False

    @property
    def block(self) -> int:
        return self.topk.block

    @property
    def params(self) -> tuple[int, int, int, int, int]:
        """``(codec, value_bits, variant, block, k)``."""
        block, k, value_bits = self.topk.layout
        return self.codec, value_bits, 0, block, k

    @property
    def contraction(self) -> float:
        """d in |x - C(x)|^2 <= (1 - d) |x|^2, for any normal region; docs/payload.md derives it."""
        block, k, value_bits = self.topk.layout
        lost = 4.0 ** (2 - value_bits)
        return k / block / (1 + GROUP * lost / (1 - lost))

    def kept(self, numel: int) -> int:
        """Records of the payload of ``numel`` elements."""
        block, k, _ = self.topk.layout
        return -(-numel * k // block)

    def offsets(self, numel: int) -> tuple[int, int, int]:
        """First bytes of records, of counts and behind the payload, multiples of 16."""
        kept = self.kept(numel)
        records = HEADER_NBYTES + align(-(-kept // GROUP))
        counts = records + align(2 * kept)
        return records, counts, counts + align(-(-(kept + self.topk.nblocks(numel)) // 8))

    def nbytes(self, numel: int) -> int:
        """Bytes of the payload of ``numel`` elements, a multiple of 16."""
        return self.offsets(numel)[2]

    def __str__(self) -> str:
        return f"g{self.topk}"

    @classmethod
    def parse(cls, text: str) -> GTopKSpec:
        """The spec whose ``str`` is ``text``; settings are those of ``topk``."""
        try:
            return cls(topk=TopKSpec.parse(text.removeprefix("g")))
        except SpecError as error:
            raise SpecError(f"{text!r}: settings are those of topk; {error}") from None
