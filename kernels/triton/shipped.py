"""Which instances of `codes` are built beforehand: default settings, all types, with and without a tail."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from hybridcomm.kernels.device import Argument, DeviceKernel
from hybridcomm.kernels.instructions import budget
from hybridcomm.kernels.spec import parse
from hybridcomm.kernels.specs.quant import QuantSpec
from hybridcomm.kernels.triton.family import Family
from hybridcomm.kernels.triton.function import Function

__all__ = ["elements", "shipped", "warps"]

TILE = 2048  # elements per program and warp: eight spans
SLACK = 1.02  # of memory traffic: headers, flags, the checksum
REGISTERS = 224  # a warp is a block: nine of them on an SM have 144 KiB of loads under way
PAYLOADS = 2  # what budgets of kernels that read payloads are for

_NBYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_WORDS = ("numel", "first", "stride")
_FLOATS = ("weight", "decay")


def elements(spec: QuantSpec) -> int:
    """Per program: a warp's tile, or a group where that is larger."""
    return max(TILE, spec.block)


def warps(spec: QuantSpec, *, whole: bool, narrow: bool) -> int:
    """Per program: one for each tile, more where registers would not do: beside masks (not ``whole``), the more with a
    residual of 16 bits (``narrow``)."""
    return elements(spec) // TILE << (0 if whole else 1 + narrow)


def _argument(name: str, types: dict[str, str]) -> Argument:
    if name in types:
        return Argument(name=name, type=types[name])
    if name in _FLOATS:
        return Argument(name=name, type="fp32", aligned=False)
    # Regions end at a multiple of 16 elements, else masks cut vectors; the other lengths are multiples by format.
    return Argument(name=name, type="i64" if name in _WORDS else "i32", aligned=name in ("numel", "stride"))


def _kernel(  # noqa: PLR0917
    text: str, spec: QuantSpec, kind: str, function: Function, fixed: dict[str, int], types: dict[str, str], whole: bool
) -> DeviceKernel:  # fmt: skip
    size, names = elements(spec), function.arguments
    floats = sum(_NBYTES[types[name][1:]] for name in ("grad", "e_in", "e_out") if name in names)
    payload = spec.nbytes(size << 10) / (size << 10)
    if kind == "decode":
        floats, payload = 2 * _NBYTES["fp32"], PAYLOADS * payload
    elif kind == "reencode":
        payload *= 1 + PAYLOADS
    marks = [types[name][1:] for name in ("grad", "e_in") if name in names]
    name = "_".join([text, kind, *marks, *([] if whole else ["tail"])])
    return DeviceKernel(
        name=name,
        source=function.source,
        function=function.name,
        arguments=tuple(_argument(name, types) for name in names),
        constants=(("ELEMENTS", size), ("WHOLE", int(whole)), *fixed.items()),
        num_warps=warps(spec, whole=whole, narrow=types.get("e_in") == "*bf16"),
        elements=size,
        budget=budget(name, nbytes=SLACK * (floats + payload), registers=REGISTERS),
        codec=str(spec),
        tail=not whole,
        trips={"encode": None, "reencode": PAYLOADS - 1, "decode": PAYLOADS}[
            kind
        ],  # all loops are over payloads
    )


def shipped(family: Family, texts: Sequence[str]) -> tuple[DeviceKernel, ...]:
    """Kernels of the specs that ``texts`` name.

    Whole programs take regions of a multiple of ``elements``; a tail's kernel takes any multiple of 16 from program
    ``first`` on. Other sizes, settings, and a decay, are left to Triton's own compiler.
    """
    kernels = []
    for text, whole in product(texts, (True, False)):
        spec = parse(text)
        if not isinstance(spec, QuantSpec):
            raise TypeError(f"{text}: no quantising codec")
        own = family.constants(spec)
        feedback = {"HAS_IN": 1, "HAS_OUT": 1, "DECAYED": 0}
        for grad, rest in (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "bf16")):
            types = {"grad": f"*{grad}", "e_in": f"*{rest}", "e_out": f"*{rest}", "payload": "*u8"}
            fixed = {**own, **feedback, "VECTOR": 4 if grad == rest == "fp32" else 8}
            kernels.append(_kernel(text, spec, "encode", family.encode, fixed, types, whole))
        for rest in ("fp32", "bf16"):
            types = {"payloads": "*u8", "e_in": f"*{rest}", "e_out": f"*{rest}", "payload": "*u8"}
            fixed = {**own, **feedback, "VECTOR": 4 if rest == "fp32" else 8}
            kernels.append(_kernel(text, spec, "reencode", family.reencode, fixed, types, whole))
        types = {"payloads": "*u8", "out": "*fp32"}
        kernels.append(_kernel(text, spec, "decode", family.decode, own, types, whole))
    return tuple(kernels)
