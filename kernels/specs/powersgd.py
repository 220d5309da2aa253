"""powersgd as data: a region as a low-rank matrix; docs/payload.md has the prose.

[ scale, one u8 ][ P, rank columns of fp32 ][ Q, rank columns of fp32 ]
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hybridcomm.kernels.payload import HEADER_NBYTES, Codec, SpecError, align
from hybridcomm.kernels.specs.topk import MAX_BLOCK, MIN_BLOCK

__all__ = ["PowerSGDSpec"]

MAX_RANK = 16
DEFAULT_COLUMNS = 512  # a chunk of 1 MiB is then a square


@dataclass(frozen=True, kw_only=True)
class PowerSGDSpec:
    """A region as a matrix of ``block`` columns, approximated by P Q^T of ``rank`` after one power iteration.

    Stateless: the iteration starts from signs drawn by the header's seed, not from the last step's Q. Matrices are
    chunks of a flat bucket, not parameters. Source: PowerSGD, Vogels et al. 2019, arXiv 1905.13727.

    Raises:
        SpecError: rank outside 1..16, or columns that are no power of two in [16, 4096].
    """

    rank: int = 1
    block: int = DEFAULT_COLUMNS

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise SpecError(f"rank {self.rank}: use 1 to {MAX_RANK}")
        if self.block < MIN_BLOCK or self.block > MAX_BLOCK or self.block & (self.block - 1):
            raise SpecError(f"{self.block} columns: use a power of two from {MIN_BLOCK} to {MAX_BLOCK}")

    codec = Codec.POWERSGD
    whole_region = False
    seeded = True
    unbiased = False
    summable = False

    @property
    def params(self) -> tuple[int, int, int, int, int]:
        """``(codec, value_bits, variant, block, k)``; k is the rank."""
        return self.codec, 32, 0, self.block, self.rank

    @property
    def contraction(self) -> float:
        """d in E|x - C(x)|^2 <= (1 - d) |x|^2 over seeds; for one seed the error is never larger than x."""
        return (1 - 2.0**-10) / self.block

    def rows(self, numel: int) -> int:
        """Of the matrix; the last row is padded with zeros."""
        return -(-numel // self.block)

    def offsets(self, numel: int) -> tuple[int, int, int]:
        """First bytes of P, of Q and behind the payload, multiples of 16."""
        if numel == 0:
            return HEADER_NBYTES, HEADER_NBYTES, HEADER_NBYTES
        left = HEADER_NBYTES + align(1)
        right = left + align(4 * self.rank * self.rows(numel))
        return left, right, right + align(4 * self.rank * self.block)

    def nbytes(self, numel: int) -> int:
        """Bytes of the payload of ``numel`` elements, a multiple of 16."""
        return self.offsets(numel)[2]

    def __str__(self) -> str:
        return f"powersgd:{self.rank}/b{self.block}"

    @classmethod
    def parse(cls, text: str) -> PowerSGDSpec:
        """The spec whose ``str`` is ``text``; ``powersgd`` is rank 1, ``powersgd:4`` has the default columns."""
        match = re.fullmatch(r"powersgd(?::(\d+))?(?:/b(\d+))?", text)
        if match is None:
            raise SpecError(f"{text!r}: write powersgd, powersgd:4 or powersgd:4/b512")
        rank, block = match.groups()
        return cls(
            rank=1 if rank is None else int(rank), block=DEFAULT_COLUMNS if block is None else int(block)
        )
