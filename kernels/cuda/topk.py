"""What ``topk.cu`` defines, for ``topk:0.01``: blocks of 1024, ten records, codes of six bits.

The threshold is found anew in every call, from the maxima of a warp's lanes, so nothing is remembered between calls.
``cold`` is a block whose largest elements lie so unevenly that those maxima bound them badly.
"""

from __future__ import annotations

from hybridcomm.kernels.cuda.arguments import BYTES, NUMEL, SLACK, pointers, scalars
from hybridcomm.kernels.device import Argument, DeviceKernel
from hybridcomm.kernels.instructions import budget
from hybridcomm.kernels.specs.topk import TopKSpec

__all__ = ["KERNELS", "SPEC"]

SPEC = TopKSpec()
"""The only one that the source is compiled for."""

_WARPS = 4
_PAYLOAD = SPEC.nbytes(1 << 20) / (1 << 20)  # bytes per element
_RECORD = (
    64 * SPEC.layout[1] / SPEC.block
)  # bytes per element to change what records name, 32 read, 32 written


def _kernel(name: str, arguments: tuple[Argument, ...], *, nbytes: float, registers: int) -> DeviceKernel:
    block, k, value_bits = SPEC.layout
    return DeviceKernel(
        name=name,
        source="cuda/topk.cu",
        function=name,
        arguments=arguments,
        constants=(("BLOCK", block), ("K", k), ("VALUE_BITS", value_bits)),
        num_warps=_WARPS,
        elements=_WARPS * block,
        budget=budget(name, nbytes=SLACK * nbytes, registers=registers),
        codec=str(SPEC),
    )


def _encode(grad: str, rest: str) -> DeviceKernel:
    return _kernel(
        f"topk_encode_{grad}_{rest}",
        pointers(grad=grad, e_in=rest, e_out=rest, payload="u8")
        + NUMEL
        + scalars(records_at="i64", decay="fp32"),
        nbytes=BYTES[grad] + 2 * BYTES[rest] + _PAYLOAD,
        registers=80,
    )


def _withdraw(rest: str) -> DeviceKernel:
    return _kernel(
        f"topk_withdraw_{rest}",
        pointers(e_in=rest, e_out=rest, payload="u8") + NUMEL + scalars(records_at="i64", checksum="i64"),
        nbytes=2 * BYTES[rest] + _PAYLOAD,
        registers=32,
    )


def _decode(name: str, nbytes: float, registers: int) -> DeviceKernel:
    """Budgets are for one payload; another adds what its records need."""
    return _kernel(
        name,
        pointers(payloads="u8", out="fp32")
        + scalars(count="i32", stride="i64")
        + NUMEL
        + scalars(records_at="i64", weight="fp32"),
        nbytes=nbytes,
        registers=registers,
    )


def _reencode(rest: str) -> DeviceKernel:
    return _kernel(
        f"topk_reencode_{rest}",
        pointers(payloads="u8", e_in=rest, e_out=rest, payload="u8")
        + scalars(count="i32", stride="i64")
        + NUMEL
        + scalars(records_at="i64", weight="fp32", decay="fp32"),
        nbytes=2 * BYTES[rest] + 2 * _PAYLOAD,
        registers=80,
    )


KERNELS: tuple[DeviceKernel, ...] = (
    *(_encode(grad, rest) for rest in ("fp32", "bf16") for grad in BYTES),
    _withdraw("fp32"),
    _withdraw("bf16"),
    _decode("topk_decode_add", _RECORD + _PAYLOAD, 32),
    _decode("topk_decode", 4 + _PAYLOAD, 48),
    _reencode("fp32"),
    _reencode("bf16"),
)
"""``encode`` by types of gradient and residual, ``withdraw``, ``decode_add`` into a shard, ``decode`` into one that
need not be cleared first, ``reencode`` of a sum for the second stage of an exchange."""
