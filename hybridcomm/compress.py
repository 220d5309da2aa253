"""Step 4 of 7: compress.

In: the text or object a caller passes as ``compress=``. Out: a Compressor: static payload sizes, the
canonical text that goes into plans and their digest, and the facts that policy needs. The arithmetic is in
`hybridcomm.kernels`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridcomm.custom import CustomCompressor, CustomSpec
from hybridcomm.errors import CompressorError, DataTypeError, UnsupportedError
from hybridcomm.kernels.payload import Codec

if TYPE_CHECKING:
    from hybridcomm.kernels.spec import Spec
    from hybridcomm.residual import Residual

__all__ = [
    "LINKS",
    "ByLink",
    "Compress",
    "Compressor",
    "LinkCompressors",
    "by_link",
    "check_compressible",
    "check_feedback",
    "resolve",
]

LINKS = ("inter_node", "intra_node")
"""Link classes that ``compress=`` may name."""


@dataclass(frozen=True, kw_only=True)
class Compressor:
    """A codec with its settings; stateless and deterministic.

    ``align``: shard boundaries fall on multiples of it too, so that all codecs of a schedule cut a tensor alike
    and no element of a residual changes its owner.
    """

    spec: Spec
    align: int = 1

    @property
    def block(self) -> int:
        """Elements on whose multiples shard boundaries fall: the codec's blocks, or several of them."""
        return math.lcm(self.spec.block, self.align)

    @property
    def whole_region(self) -> bool:
        """Whether a shard is compressed as one region and never cut into chunks."""
        return self.spec.whole_region

    @property
    def unbiased(self) -> bool:
        """Whether E[C(x)] = x."""
        return self.spec.unbiased

    @property
    def summable(self) -> bool:
        """Whether payloads can be added without decoding."""
        return self.spec.summable

    @property
    def contraction(self) -> float | None:
        """delta in |x - C(x)|^2 <= (1 - delta) |x|^2, quantisation included; None where there is none."""
        return self.spec.contraction

    def nbytes(self, numel: int) -> int:
        """Bytes of the payload of ``numel`` elements, header included."""
        return self.spec.nbytes(numel)

    def ratio(self, numel: int) -> float:
        """Dense fp32 bytes per payload byte for ``numel`` elements."""
        return 4.0 * numel / self.nbytes(numel) if numel else 1.0

    def __str__(self) -> str:
        return str(self.spec)


_OF_EVERY_ELEMENT = (Codec.FP16, Codec.BF16, Codec.FP8, Codec.INT8, Codec.INT4, Codec.SIGN1, Codec.POWERSGD)

Compress = str | Compressor | CustomCompressor | None
"""What ``compress=`` takes."""


def resolve(compress: Compress) -> Compressor | None:
    """What ``compress=`` means: None and "none" are dense; "topk" takes the default ratio, "topk:0.01" that
    one; "int8" the default group, "int8/g64" that one; a `CustomCompressor` is wrapped.

    Raises `CompressorError` for an unknown name (with the nearest known one) or a setting out of range.
    """
    if compress is None or isinstance(compress, Compressor):
        return compress
    if isinstance(compress, CustomCompressor):
        return Compressor(spec=CustomSpec(compress))
    if not isinstance(compress, str):
        raise CompressorError(f"compress={compress!r}: expected None or a text such as 'topk:0.01'")
    if compress == "none":
        return None

    from hybridcomm.kernels.spec import CODECS, SpecError, name_of, parse

    name = name_of(compress)
    if name == "custom":
        raise CompressorError(
            f"compress={compress!r}: pass the CustomCompressor itself, its text names no code"
        )
    if name not in CODECS:
        near = difflib.get_close_matches(name.lower(), CODECS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(CODECS)}"
        raise CompressorError(f"compress={compress!r}: unknown compressor {name!r}; {hint}")
    try:
        return Compressor(spec=parse(compress))
    except SpecError as error:
        raise CompressorError(f"compress={compress!r}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class LinkCompressors:
    """What is compressed on which link class; ``inter_node`` as the caller passed it, "auto" included.

    Raises `CompressorError` for a custom compressor inside a node.
    """

    inter_node: Compress = None
    intra_node: Compressor | None = None

    def __post_init__(self) -> None:
        if self.intra_node is not None and self.intra_node.spec.codec == Codec.CUSTOM:
            raise CompressorError(f"intra_node={self.intra_node}: custom compressors act between nodes only")


ByLink = Compress | Mapping[str, Compress] | LinkCompressors
"""What ``compress=`` takes where link classes may be told apart; a mapping has keys of `LINKS`."""


def by_link(compress: ByLink) -> LinkCompressors:
    """``compress=`` by link class: what is no mapping means ``inter_node``.

    Raises `CompressorError` for an unknown link class, for a mapping without any, for "auto" in a mapping (its
    predictions know nothing of compression inside a node), and for a custom compressor inside a node.
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


def check_feedback(compressor: Compressor, residual: Residual) -> None:
    """Raises `UnsupportedError` where error feedback would diverge, or momentum with factor masking cannot act.

    It diverges with a codec that is unbiased and does not contract; masking leaves no velocity where a codec sends
    something of every element.
    """
    if compressor.unbiased and compressor.contraction is None:
        raise UnsupportedError(
            f"compress={compressor}: an unbiased codec takes no error feedback; pass residual=None, or leave "
            "'+unbiased' out"
        )
    codec = compressor.spec.codec
    if residual.momentum and residual.masking and codec in _OF_EVERY_ELEMENT:
        raise UnsupportedError(
            f"compress={compressor} sends something of every element, so masking leaves no velocity: use a sparse "
            "codec such as 'topk:0.01', Residual(masking=False), or the optimizer's own momentum"
        )
