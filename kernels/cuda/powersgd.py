"""What ``powersgd.cu`` defines, for ranks 1, 2 and 4 and matrices of 512 columns.

``right`` has 16 programs and ``orthonormal`` one, whatever the region's size: their sums have an order, so no more
threads could work on them. Budgets are for regions of 128 rows and more, and for one payload where payloads are
read.
"""

from __future__ import annotations

from hybridcomm.kernels.cuda.arguments import BYTES, NUMEL, SLACK, pointers, scalars
from hybridcomm.kernels.device import Argument, DeviceKernel
from hybridcomm.kernels.instructions import budget
from hybridcomm.kernels.specs.powersgd import PowerSGDSpec

__all__ = ["ACROSS", "KERNELS", "SPECS"]

SPECS = tuple(PowerSGDSpec(rank=rank) for rank in (1, 2, 4))
"""Those that the source is compiled for."""
ACROSS = 16
"""Programs of ``right``."""

_TILE = 4096  # elements of a program that streams
_ANY = 1 << 62  # elements of a program, of which there are as many for any region
_ROWS = 128  # of the smallest region that budgets are for
_REGISTERS = 80  # of 128 threads, so that six blocks have loads under way

_COUNT = scalars(count="i32", stride="i64") + NUMEL


def _payload(spec: PowerSGDSpec) -> float:
    """Bytes per element."""
    return spec.nbytes(_ROWS * spec.block) / (_ROWS * spec.block)


def _encode(grad: str, rest: str) -> DeviceKernel:
    """For all ranks."""
    name = f"powersgd_encode_{grad}_{rest}"
    return DeviceKernel(
        name=name,
        source="cuda/powersgd.cu",
        function=name,
        arguments=pointers(grad=grad, e_in=rest, acc="fp32", payload="u8") + NUMEL + scalars(decay="fp32"),
        constants=(("COLUMNS", SPECS[0].block),),
        num_warps=4,
        elements=_TILE,
        budget=budget(name, nbytes=SLACK * (BYTES[grad] + BYTES[rest] + 4), registers=_REGISTERS),
    )


def _kernel(
    spec: PowerSGDSpec,
    name: str,
    arguments: tuple[Argument, ...],
    nbytes: float,
    *,
    registers: int = _REGISTERS,
    num_warps: int = 4,
    elements: int = _TILE,
    touched: tuple[str, ...] = (),
) -> DeviceKernel:
    return DeviceKernel(
        name=f"powersgd{spec.rank}_{name}",
        source="cuda/powersgd.cu",
        function=f"powersgd{spec.rank}_{name}",
        arguments=arguments,
        constants=(("COLUMNS", spec.block), ("RANK", spec.rank)),
        num_warps=num_warps,
        elements=elements,
        budget=budget(f"powersgd{spec.rank}_{name}", nbytes=SLACK * nbytes, registers=registers),
        codec=str(spec),
        touched=touched,
    )


def _sums(spec: PowerSGDSpec) -> tuple[DeviceKernel, ...]:
    """The passes whose sums have an order."""
    each = _payload(spec)
    source = pointers(acc="fp32", payload="u8") + NUMEL
    return (
        _kernel(
            spec,
            "left",
            source,
            4 + each,
            elements=4 * _TILE,
        ),
        _kernel(
            spec,
            "orthonormal",
            pointers(payload="u8") + NUMEL,
            2 * each,
            registers=96,
            num_warps=8,
            elements=_ANY,
        ),
        _kernel(
            spec,
            "right",
            source,
            4 + each,
            registers=72,
            num_warps=8,
            elements=_ANY,
        ),
    )


def _reencode(spec: PowerSGDSpec, rest: str) -> DeviceKernel:
    return _kernel(
        spec,
        f"reencode_{rest}",
        pointers(payloads="u8", e_in=rest, acc="fp32", payload="u8")
        + _COUNT
        + scalars(weight="fp32", decay="fp32"),
        BYTES[rest] + 4 + _payload(spec),
    )


def _rest(spec: PowerSGDSpec, rest: str) -> DeviceKernel:
    return _kernel(
        spec,
        f"rest_{rest}",
        pointers(acc="fp32", e_in=rest, e_out=rest, payload="u8") + NUMEL + scalars(checksum="i64"),
        4 + BYTES[rest] + _payload(spec),
        touched=("e_in",),
    )


def _decode(spec: PowerSGDSpec, name: str, floats: int) -> DeviceKernel:
    return _kernel(
        spec,
        name,
        pointers(payloads="u8", out="fp32") + _COUNT + scalars(weight="fp32"),
        floats + _payload(spec),
    )


KERNELS: tuple[DeviceKernel, ...] = (
    *(_encode(grad, rest) for rest in ("fp32", "bf16") for grad in BYTES),
    *(
        kernel
        for spec in SPECS
        for kernel in (
            *_sums(spec),
            *(make(spec, rest) for make in (_reencode, _rest) for rest in ("fp32", "bf16")),
            _decode(spec, "decode_add", 8),
            _decode(spec, "decode", 4),
        )
    ),
)
"""``encode`` by types of gradient and residual, or ``reencode`` of a sum, then ``left``, ``orthonormal``, ``right`` and
``rest``;
``decode_add`` into a shard, ``decode`` into one that need not be cleared first."""
