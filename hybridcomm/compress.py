"""Step 4 of 7: compress.

In: the text or object a caller passes as ``compress=``. Out: a Compressor: static payload sizes, the
canonical text that goes into plans and their digest, and the facts that policy needs. The arithmetic is in
`hybridcomm.kernels`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING

from hybridcomm.errors import CompressorError, DataTypeError, UnsupportedError

if TYPE_CHECKING:
    from hybridcomm.kernels.spec import TopKSpec

__all__ = [
    "COMPRESSORS",
    "LINKS",
    "Compress",
    "Compressor",
    "LinkCompressors",
    "by_link",
    "check_compressible",
    "resolve",
]

COMPRESSORS = ("topk",)
"""Names that ``compress=`` knows."""

LINKS = ("inter_node", "intra_node")
"""Link classes that ``compress=`` may name."""


@dataclass(frozen=True, kw_only=True)
class Compressor:
    """Block-wise top-k with quantised values; stateless and deterministic.

    ``unbiased``: whether E[C(x)] = x. ``summable``: whether payloads can be added without decoding.
    """

    spec: TopKSpec
    unbiased: bool = False
    summable: bool = False

    @property
    def block(self) -> int:
        """Elements per block; shard boundaries fall on multiples of it."""
        return self.spec.block

    @property
    def contraction(self) -> float:
        """delta in |x - C(x)|^2 <= (1 - delta) |x|^2, quantisation included."""
        return self.spec.contraction

    def nbytes(self, numel: int) -> int:
        """Bytes of the payload of ``numel`` elements, header included."""
        return self.spec.nbytes(numel)

    def ratio(self, numel: int) -> float:
        """Dense fp32 bytes per payload byte for ``numel`` elements."""
        return 4.0 * numel / self.nbytes(numel) if numel else 1.0

    def __str__(self) -> str:
        return str(self.spec)


def resolve(compress: str | Compressor | None) -> Compressor | None:
    """What ``compress=`` means: None and "none" are dense; "topk" takes the default ratio, "topk:0.01" that
    one.

    Raises `CompressorError` for an unknown name (with the nearest known one) or a setting out of range.
    """
    if compress is None or isinstance(compress, Compressor):
        return compress
    if not isinstance(compress, str):
        raise CompressorError(f"compress={compress!r}: expected None or a text such as 'topk:0.01'")
    if compress == "none":
        return None
    name, colon, setting = compress.partition("/")[0].partition(":")
    if name not in COMPRESSORS:
        near = difflib.get_close_matches(name.lower(), COMPRESSORS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(COMPRESSORS)}"
        raise CompressorError(f"compress={compress!r}: unknown compressor {name!r}; {hint}")
    if colon and not setting:
        raise CompressorError(f"compress={compress!r}: give the ratio after the colon, such as 'topk:0.01'")

    from hybridcomm.kernels.spec import SpecError, TopKSpec

    try:
        return Compressor(spec=TopKSpec.parse(compress))
    except SpecError as error:
        raise CompressorError(f"compress={compress!r}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class LinkCompressors:
    """What is compressed on which link class; ``inter_node`` may still be a text, such as "auto"."""

    inter_node: str | Compressor | None = None
    intra_node: Compressor | None = None

    @property
    def block(self) -> int | None:
        """Elements of which each shard has a multiple, for all compressors; None: nothing is compressed."""
        blocks = [
            codec.block for codec in (self.inter_node, self.intra_node) if isinstance(codec, Compressor)
        ]
        return lcm(*blocks) if blocks else None

    def __str__(self) -> str:
        inter = "none" if self.inter_node is None else str(self.inter_node)
        return inter if self.intra_node is None else f"inter_node={inter},intra_node={self.intra_node}"


Compress = str | Compressor | None | Mapping[str, "str | Compressor | None"] | LinkCompressors
"""What a caller may pass as ``compress=``; a mapping has the keys of `LINKS`."""


def by_link(compress: Compress) -> LinkCompressors:
    """``compress=`` by link class: a plain text or compressor means ``inter_node``.

    Raises `CompressorError` for an unknown link class, for a mapping without any, and for "auto" in a mapping:
    its predictions know nothing of compression inside a node.
    """
    if isinstance(compress, LinkCompressors):
        return compress
    if not isinstance(compress, Mapping):
        return LinkCompressors(inter_node=compress)
    if not compress or not set(compress) <= set(LINKS):
        raise CompressorError(f"compress={dict(compress)!r}: a mapping has the keys {' and '.join(LINKS)}")
    for text in compress.values():
        if isinstance(text, str) and text.partition(":")[0] == "auto":
            raise CompressorError(
                f"compress={dict(compress)!r}: name compressors; 'auto' is asked for on its own"
            )
    inter, intra = (resolve(compress.get(link)) for link in LINKS)
    return LinkCompressors(inter_node=inter, intra_node=intra)


def check_compressible(compressor: Compressor, *, dtype: str, op: str) -> None:
    """Raises where compression cannot act: only float32 sums and means can be compressed."""
    if dtype != "float32":
        raise DataTypeError(
            f"compress={compressor}: cannot compress {dtype}; convert to float32 or pass compress=None"
        )
    if op not in ("sum", "mean"):
        raise UnsupportedError(f"compress={compressor}: op={op!r} cannot be compressed; use 'sum' or 'mean'")
