"""What ``gtopk.cu`` defines, for ``gtopk:0.01``, and the order in which its kernels are launched.

The sizes of all passes follow from the spec and the region's size, so a sequence of launches is data: made once, then
enqueued or captured. Between the passes acc lies in e_out, which has to be there; where residuals are bf16, in the
workspace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hybridcomm.kernels.cuda.arguments import BYTES, NUMEL, SLACK, pointers, scalars
from hybridcomm.kernels.device import Argument, DeviceKernel
from hybridcomm.kernels.instructions import budget
from hybridcomm.kernels.payload import SpecError, align
from hybridcomm.kernels.specs.gtopk import GTopKSpec

__all__ = ["KERNELS", "SPEC", "At", "Launch", "decode_steps", "encode_steps", "workspace"]

SPEC = GTopKSpec()
"""The only one that the source is compiled for."""

_WARPS = 8
_THREADS = 32 * _WARPS
_TILE = 8192  # elements of a program of count and collect
_SPAN = 2 * _TILE  # of first and histogram
_BINS = 2048
_ANY = 1 << 62  # elements of a program that is the only one
_RECORDS = _THREADS * SPEC.block // SPEC.topk.layout[1]  # elements that a program of pack stands for
_COUNTS = 3_000_000  # elements whose counts fill at most the 4096 bytes that a program of ones and add reads
_SHARE = SPEC.topk.layout[1] / SPEC.block
_PAYLOAD = SPEC.nbytes(1 << 20) / (1 << 20)
_EACH = _THREADS / _TILE  # bytes per element for one that every thread of a program reads


@dataclass(frozen=True, kw_only=True)
class At:
    """An address: ``offset`` bytes into what the caller gives under this name."""

    buffer: str
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel of a sequence: its number of programs, and its arguments in their order."""

    kernel: DeviceKernel
    programs: int
    arguments: tuple[At | int | float | None, ...]


def _kernel(
    name: str,
    arguments: tuple[Argument, ...],
    elements: int,
    *,
    nbytes: float,
    registers: int,
    touched: tuple[str, ...] = (),
) -> DeviceKernel:
    block, k, value_bits = SPEC.topk.layout
    return DeviceKernel(
        name=f"gtopk_{name}",
        source="cuda/gtopk.cu",
        function=f"gtopk_{name}",
        arguments=arguments,
        constants=(("BLOCK", block), ("K", k), ("VALUE_BITS", value_bits)),
        num_warps=_WARPS,
        elements=elements,
        budget=budget(f"gtopk_{name}", nbytes=nbytes, registers=registers),
        codec=str(SPEC),
        touched=touched,
    )


def _first(grad: str, rest: str) -> DeviceKernel:
    return _kernel(
        f"first_{grad}_{rest}",
        pointers(grad=grad, e_in=rest, acc="fp32", payload="u8", bins="i32") + NUMEL + scalars(decay="fp32"),
        _SPAN,
        nbytes=SLACK * (BYTES[grad] + BYTES[rest] + 4) + 4 * _BINS / _SPAN,
        registers=48,
    )


_ONE: dict[str, Any] = {"nbytes": 1, "registers": 48}  # of a single program, whatever the region's size

KERNELS: tuple[DeviceKernel, ...] = (
    *(_first(grad, rest) for rest in ("fp32", "bf16") for grad in BYTES),
    _kernel(
        "histogram",
        pointers(acc="fp32", found="i64", bins="i32") + scalars(shift="i32") + NUMEL,
        _SPAN,
        nbytes=SLACK * 4 + 4 * _BINS / _SPAN,
        registers=48,
    ),
    _kernel("narrow", pointers(bins="i32", found="i64", to="i64") + scalars(kept="i64"), _ANY, **_ONE),
    _kernel(
        "count",
        pointers(acc="fp32", found="i64", counts="i64") + NUMEL,
        _TILE,
        nbytes=SLACK * 4 + 8 * _EACH,
        registers=64,
    ),
    _kernel("scan", pointers(counts="i64") + scalars(tiles="i32"), _ANY, **_ONE),
    _kernel(
        "collect",
        pointers(acc="fp32", found="i64", counts="i64", values="fp32", indices="i32") + NUMEL,
        _TILE,
        nbytes=SLACK * (8 + 8 * _SHARE) + 24 * _EACH,
        registers=64,
        touched=("values",),
    ),
    _kernel(
        "pack",
        pointers(values="fp32", indices="i32", rest="fp32", payload="u8")
        + scalars(kept="i64", records_at="i64", counts_at="i64"),
        _RECORDS,
        nbytes=SLACK * (72 * _SHARE + 2 * _PAYLOAD),
        registers=48,
    ),
    _kernel(
        "withdraw",
        pointers(e_in="fp32", e_out="fp32", payload="u8")
        + scalars(nbytes="i64")
        + NUMEL
        + scalars(checksum="i64"),
        _TILE,
        nbytes=SLACK * (8 + _PAYLOAD),
        registers=32,
    ),
    _kernel(
        "settle",
        pointers(acc="fp32", e_in="bf16", e_out="bf16", payload="u8") + NUMEL,
        _TILE,
        nbytes=SLACK * 6,
        registers=48,
        touched=("e_in",),
    ),
    _kernel(
        "ones",
        pointers(payload="u8", counts="i64") + scalars(counts_at="i64", words="i32"),
        _COUNTS,
        nbytes=_PAYLOAD,
        registers=48,
    ),
    _kernel(
        "add",
        pointers(payload="u8", counts="i64", out="fp32")
        + scalars(records_at="i64", counts_at="i64", words="i32", weight="fp32"),
        _COUNTS,
        nbytes=SLACK * (64 * _SHARE + 2 * _PAYLOAD),
        registers=48,
    ),
    _kernel(
        "spoil",
        pointers(payloads="u8", out="fp32") + scalars(count="i32", stride="i64") + NUMEL,
        _TILE,
        nbytes=SLACK * 4,
        registers=32,
    ),
)

_BY_NAME: Mapping[str, DeviceKernel] = MappingProxyType(
    {kernel.name.removeprefix("gtopk_"): kernel for kernel in KERNELS}
)


@dataclass(frozen=True, kw_only=True)
class _Workspace:
    """Offsets in bytes, all multiples of 16; ``cleared`` bytes from the first on have to be zero before a sequence."""

    cleared: int
    found: int
    counts: int
    values: int
    indices: int
    acc: int
    nbytes: int


def _layout(numel: int, rest: str = "fp32") -> _Workspace:
    kept = SPEC.kept(numel)
    cleared = 3 * 4 * _BINS
    counts = cleared + 3 * 16
    values = counts + align(8 * max(_BY_NAME["count"].grid(numel), _BY_NAME["ones"].grid(numel)))
    indices = values + align(4 * kept)
    return _Workspace(
        cleared=cleared,
        found=cleared,
        counts=counts,
        values=values,
        indices=indices,
        acc=indices + align(4 * kept),
        nbytes=indices + align(4 * kept) + (4 * numel if rest == "bf16" else 0),
    )


def workspace(numel: int, rest: str = "fp32") -> tuple[int, int]:
    """Bytes of device memory that a sequence needs under the name ``workspace``, and how many of them, from the first
    on, have to be zero before ``encode_steps``. ``rest``: the residual's type, of which decoding has none.

    Raises:
        SpecError: the region is no multiple of 16 elements, or has 2^32 or more, whose indices need more bits.
    """
    if numel % 16 or numel >> 32:
        raise SpecError(f"gtopk of {numel} elements: pad to a multiple of 16, below 2^32")
    layout = _layout(numel, rest)
    return layout.nbytes, layout.cleared


def _launch(name: str, numel: int, *arguments: At | int | float | None) -> Launch:
    kernel = _BY_NAME[name]
    return Launch(kernel=kernel, programs=kernel.grid(numel), arguments=arguments)


def encode_steps(
    numel: int,
    grad: str = "fp32",
    rest: str = "fp32",
    *,
    feedback: bool = True,
    decay: float = 1.0,
    withdrawn: int,
) -> tuple[Launch, ...]:
    """What compresses ``numel`` elements, in order, on one stream.

    Buffers: grad, e_in (where ``feedback``), e_out, which is another, payload, whose body is zero and whose header is
    that of an empty one, and workspace. ``withdrawn``: the checksum of a payload with the flag up and no body.

    Raises:
        SpecError: as ``workspace``.
    """
    workspace(numel)
    if numel == 0:
        return ()
    at, kept = _layout(numel), SPEC.kept(numel)
    records_at, counts_at, nbytes = SPEC.offsets(numel)
    e_in, e_out, payload = At(buffer="e_in") if feedback else None, At(buffer="e_out"), At(buffer="payload")
    acc = e_out if rest == "fp32" else At(buffer="workspace", offset=at.acc)
    bins = [At(buffer="workspace", offset=4 * _BINS * i) for i in range(3)]
    found = [At(buffer="workspace", offset=at.found + 16 * i) for i in range(3)]
    counts, values, indices = (
        At(buffer="workspace", offset=offset) for offset in (at.counts, at.values, at.indices)
    )
    return (
        _launch(f"first_{grad}_{rest}", numel, At(buffer="grad"), e_in, acc, payload, bins[0], numel, decay),
        _launch("narrow", numel, bins[0], None, found[0], kept),
        _launch("histogram", numel, acc, found[0], bins[1], 10, numel),
        _launch("narrow", numel, bins[1], found[0], found[1], kept),
        _launch("histogram", numel, acc, found[1], bins[2], 0, numel),
        _launch("narrow", numel, bins[2], found[1], found[2], kept),
        _launch("count", numel, acc, found[2], counts, numel),
        _launch("scan", numel, counts, _BY_NAME["count"].grid(numel)),
        _launch("collect", numel, acc, found[2], counts, values, indices, numel),
        _launch("pack", numel, values, indices, acc, payload, kept, records_at, counts_at),
        *(
            [_launch("withdraw", numel, e_in, acc, payload, nbytes, numel, withdrawn)]
            if rest == "fp32"
            else [
                _launch("withdraw", numel, None, acc, payload, nbytes, numel, withdrawn),
                _launch("settle", numel, acc, e_in, e_out, payload, numel),
            ]
        ),
    )


def decode_steps(numel: int, count: int, *, weight: float = 1.0) -> tuple[Launch, ...]:
    """What adds ``count`` payloads, one behind another in the buffer ``payloads``, to ``out``, in order.

    Buffers: payloads, which have been checked, out, and workspace.

    Raises:
        SpecError: as ``workspace``.
    """
    workspace(numel)
    if numel == 0:
        return ()
    records_at, counts_at, nbytes = SPEC.offsets(numel)
    words, counts, out = (
        (nbytes - counts_at) // 4,
        At(buffer="workspace", offset=_layout(numel).counts),
        At(buffer="out"),
    )
    steps: list[Launch] = []
    for p in range(count):
        payload = At(buffer="payloads", offset=p * nbytes)
        steps += (
            _launch("ones", numel, payload, counts, counts_at, words),
            _launch("scan", numel, counts, _BY_NAME["ones"].grid(numel)),
            _launch("add", numel, payload, counts, out, records_at, counts_at, words, weight),
        )
    return (*steps, _launch("spoil", numel, At(buffer="payloads"), out, count, nbytes, numel))
