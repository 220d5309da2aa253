"""randk as data: a random element of each stratum, its index never sent; docs/payload.md has the prose.

[ scales, one u8 per block ][ codes, k x i8 per block ]
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hybridcomm.kernels.payload import HEADER_NBYTES, Codec, SpecError, align
from hybridcomm.kernels.specs.topk import DEFAULT_RATIO, MAX_BLOCK

__all__ = ["RandKSpec"]

VALUE_BITS = 8
MIN_STRATA = 16


@dataclass(frozen=True, kw_only=True)
class RandKSpec:
    """Of each stratum of ``rows`` neighbouring elements one is drawn by a hash of the header's seed and sent.

    ``unbiased``: codes are rounded at random and decoded values are ``rows`` times as large, so that
    E[C(x)] = x; such a codec takes no error feedback, for it does not contract. Without it nothing is scaled.

    Raises:
        SpecError: rows outside 2..256.
    """

    rows: int = round(1 / DEFAULT_RATIO)
    unbiased: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.rows <= 256:
            raise SpecError(f"strata of {self.rows} elements: use a share from 0.00390625 (1/256) to 0.5")

    codec = Codec.RANDK
    whole_region = False
    seeded = True
    summable = False

    @property
    def k(self) -> int:
        """Strata per block."""
        return 2 * MIN_STRATA if 2 * MIN_STRATA * self.rows <= MAX_BLOCK else MIN_STRATA

    @property
    def block(self) -> int:
        return self.rows * self.k

    @property
    def layout(self) -> tuple[int, int, int]:
        """``(rows, k, value_bits)``."""
        return self.rows, self.k, VALUE_BITS

    @property
    def params(self) -> tuple[int, int, int, int, int]:
        """``(codec, value_bits, variant, block, k)``."""
        return self.codec, VALUE_BITS, int(self.unbiased), self.block, self.k

    @property
    def contraction(self) -> float | None:
        """d in E|x - C(x)|^2 <= (1 - d) |x|^2 over seeds; None when unbiased. For a single seed there is none."""
        if self.unbiased:
            return None
        lost = 4.0 ** (2 - VALUE_BITS)
        return 1 / self.rows / (1 + self.k * lost / (1 - lost))

    def nblocks(self, numel: int) -> int:
        return -(-numel // self.block)

    def codes_offset(self, numel: int) -> int:
        """First byte of the codes, a multiple of 16."""
        return HEADER_NBYTES + align(self.nblocks(numel))

    def nbytes(self, numel: int) -> int:
        """Bytes of the payload of ``numel`` elements, a multiple of 16."""
        return self.codes_offset(numel) + align(self.k * self.nblocks(numel))

    def __str__(self) -> str:
        return f"randk:{1 / self.rows:g}" + ("+unbiased" if self.unbiased else "")

    @classmethod
    def parse(cls, text: str) -> RandKSpec:
        """The spec whose ``str`` is ``text``: ``randk``, ``randk:0.01`` or ``randk:0.01+unbiased``.

        A share is rounded to the nearest 1 / rows.
        """
        match = re.fullmatch(r"randk(?::([^/+\s]+))?(\+unbiased)?", text)
        try:
            if match is None:
                raise ValueError(text)
            share = DEFAULT_RATIO if match[1] is None else float(match[1])
            if not 0.0 < share <= 1.0:
                raise ValueError(text)
        except ValueError:
            raise SpecError(
                f"{text!r}: write randk, randk:0.01 or randk:0.01+unbiased, with a ratio above 0 and at most 0.5"
            ) from None
        return cls(rows=min(round(1 / share), 1 << 16), unbiased=match[2] is not None)
