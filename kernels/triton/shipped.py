"""Which instances of a family's kernels are built beforehand: default settings, all types, with and without a tail."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from hybridcomm.kernels.device import Argument, Budget, DeviceKernel
from hybridcomm.kernels.spec import parse
from hybridcomm.kernels.specs.quant import QuantSpec
from hybridcomm.kernels.triton.launch import Family, elements, warps

__all__ = ["shipped"]

SLACK = 1.02  # of memory traffic: headers, flags, the checksum
REGISTERS = 224  # a warp is a block: nine of them on an SM have 144 KiB of loads under way
PAYLOADS = 2  # what budgets of kernels that read payloads are for
HALVES = 16  # instructions per element more, at most, to widen and narrow types of 16 bits and exchange their lanes
TAIL = 6  # and for masks
ANEW = 2.5  # times the budget of encoding: sums of payloads, encoded; counted in PTX, which is more than machine code

_NBYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_WORDS = ("numel", "first", "stride")
_FLOATS = ("weight", "decay")


def _argument(name: str, types: dict[str, str]) -> Argument:
    if name in types:
        return Argument(name=name, type=types[name])
    if name in _FLOATS:
        return Argument(name=name, type="fp32", aligned=False)
    # Regions end at a multiple of 16 elements, else masks cut vectors; the other lengths are multiples by format.
    return Argument(name=name, type="i64" if name in _WORDS else "i32", aligned=name in ("numel", "stride"))


def _kernel(  # noqa: PLR0917
    source: str, text: str, spec: QuantSpec, kind: str, function: object, fixed: dict[str, int],
    types: dict[str, str], whole: bool, instructions: float,
) -> DeviceKernel:  # fmt: skip
    size = elements(spec)
    constants = {"ELEMENTS": size, "WHOLE": int(whole), **fixed}
    names = [name for name in function.arg_names if name not in constants]  # type: ignore[attr-defined]
    floats = sum(_NBYTES[types[name][1:]] for name in ("grad", "e_in", "e_out") if name in names)
    payload = spec.nbytes(size << 10) / (size << 10)
    if kind == "decode":
        floats, payload = 2 * _NBYTES["fp32"], PAYLOADS * payload
    elif kind == "reencode":
        payload *= 1 + PAYLOADS
    halves = any(type_[1:] in ("bf16", "fp16") for type_ in types.values())
    marks = [types[name][1:] for name in ("grad", "e_in") if name in names]
    return DeviceKernel(
        name="_".join([text, kind, *marks, *([] if whole else ["tail"])]),
        source=source,
        function=f"{kind}_kernel",
        arguments=tuple(_argument(name, types) for name in names),
        constants=tuple((name, value) for name, value in constants.items()),
        num_warps=warps(spec, whole=whole, crowded=kind == "reencode" and halves),
        elements=size,
        budget=Budget(
            nbytes=SLACK * (floats + payload),
            instructions=instructions + HALVES * halves + TAIL * (not whole),
            registers=REGISTERS,
        ),
        codec=str(spec),
        tail=not whole,
    )


def shipped(source: str, family: Family, budgets: Mapping[str, float]) -> tuple[DeviceKernel, ...]:
    """Kernels of the specs that ``budgets`` name: instructions per element where all is fp32.

    Whole programs take regions of a multiple of ``elements``; a tail's kernel takes any multiple of 16 from program
    ``first`` on. Other sizes, settings, and a decay, are left to Triton's own compiler.
    """
    kernels = []
    for (text, instructions), whole in product(budgets.items(), (True, False)):
        spec = parse(text)
        if not isinstance(spec, QuantSpec):
            raise TypeError(f"{text}: no quantising codec")
        own = family.constants(spec)
        feedback = {"HAS_IN": 1, "HAS_OUT": 1, "DECAYED": 0}
        for grad, rest in (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "bf16")):
            types = {"grad": f"*{grad}", "e_in": f"*{rest}", "e_out": f"*{rest}", "payload": "*u8"}
            fixed = {**own, **feedback, "VECTOR": 4 if grad == rest == "fp32" else 8}
            kernels.append(
                _kernel(source, text, spec, "encode", family.encode, fixed, types, whole, instructions)
            )
        for rest in ("fp32", "bf16"):
            types = {"payloads": "*u8", "e_in": f"*{rest}", "e_out": f"*{rest}", "payload": "*u8"}
            fixed = {**own, **feedback, "VECTOR": 4 if rest == "fp32" else 8}
            kernels.append(
                _kernel(
                    source, text, spec, "reencode", family.reencode, fixed, types, whole, ANEW * instructions
                )
            )
        types = {"payloads": "*u8", "out": "*fp32"}
        kernels.append(_kernel(source, text, spec, "decode", family.decode, own, types, whole, instructions))
    return tuple(kernels)
