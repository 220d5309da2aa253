"""The payload that topk and gtop1 share: per block one scale and k records of 16 bits.

[ scales, one u8 per block ][ records, k x u16 per block ]
"""

from __future__ import annotations

from hybridcomm.kernels.payload import HEADER_NBYTES, align

__all__ = ["RecordSections"]


class RecordSections:
    """Where the sections of such a payload lie; for a spec with a ``block`` and ``layout = (_, k, value_bits)``."""

    @property
    def layout(self) -> tuple[int, int, int]:
        raise NotImplementedError

    def nblocks(self, numel: int) -> int:
        block: int = self.block  # type: ignore[attr-defined]  # a field of one spec, a property of the other
        return -(-numel // block)

    def records_offset(self, numel: int) -> int:
        """First byte of the records, a multiple of 16."""
        return HEADER_NBYTES + align(self.nblocks(numel))

    def nbytes(self, numel: int) -> int:
        """Bytes of the payload of ``numel`` elements, a multiple of 16."""
        return self.records_offset(numel) + align(2 * self.layout[1] * self.nblocks(numel))
