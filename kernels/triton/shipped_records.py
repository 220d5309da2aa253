"""Which instances of topk, gtop1 and randk are built beforehand, and what these have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hybridcomm.kernels.device import Argument, DeviceKernel
from hybridcomm.kernels.instructions import budget
from hybridcomm.kernels.triton.family import Family, family

__all__ = ["records_family", "shipped", "threads"]

SLACK = 1.02  # what may be moved, per byte that has to be
PAYLOADS = 2  # what budgets of kernels that read payloads are for

_NBYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_SCALARS = {
    "count": Argument(name="count", type="i32", aligned=False),
    "stride": Argument(name="stride", type="i64"),
    "numel": Argument(name="numel", type="i64"),
    "codes_at": Argument(name="codes_at", type="i32", aligned=False),
    "records_half": Argument(name="records_half", type="i32", aligned=False),
    "weight": Argument(name="weight", type="fp32", aligned=False),
    "decay": Argument(name="decay", type="fp32", aligned=False),
}


def threads(k: int, warps: int = 1) -> int:
    """A power of two: one for each of ``k`` records at least, and no thread without one of its own."""
    return max(32 * warps, 1 << (k - 1).bit_length())


def records_family(
    module: str, constants: Callable[[Any], dict[str, int]], second: str = "records_half"
) -> Family:
    """``second``: the argument that says where the section behind the scales begins."""
    return family(
        module,
        constants,
        {
            "encode": ("grad", "e_in", "e_out", "payload", "numel", second, "decay"),
            "reencode": (
                *("payloads", "sums", "e_in", "e_out", "payload", "count", "stride"),
                *("numel", second, "weight", "decay"),
            ),
            "decode": ("payloads", "out", "count", "stride", "numel", second, "weight"),
        },
    )


def _kernel(
    kind: str, types: dict[str, str], floats: float, fixed: dict[str, int], *, name: str, family: Family, spec: Any
) -> DeviceKernel:  # fmt: skip
    """``kind`` of a family; ``floats``: bytes that an element moves."""
    constants = family.constants(spec)
    warps = constants.pop("num_warps")
    function = getattr(family, kind)
    marks = [types[n] for n in ("grad", "e_in") if n in types]
    name = "_".join([name, kind, *(["clear"] if fixed.get("CLEAR") else []), *marks])
    return DeviceKernel(
        name=name,
        source=function.source,
        function=function.name,
        arguments=tuple(
            Argument(name=n, type=f"*{types[n]}") if n in types else _SCALARS[n] for n in function.arguments
        ),
        constants=tuple((constants | fixed).items()),
        num_warps=warps,
        elements=spec.block,
        budget=budget(name, nbytes=SLACK * floats, registers=255),
        codec=str(spec),
    )


def shipped(name: str, family: Family, spec: Any) -> tuple[DeviceKernel, ...]:
    """Kernels of one spec that are built beforehand, for regions of a multiple of 16 elements, without a decay.

    Encoders for all types, with feedback.
    """
    made = partial(_kernel, name=name, family=family, spec=spec)
    each = spec.nbytes(spec.block << 10) / (spec.block << 10)
    touched = 64 * spec.layout[1] / spec.block  # a record that is added: 32 bytes read, 32 written
    feedback = {"HAS_IN": 1, "HAS_OUT": 1, "DECAYED": 0}
    summed = PAYLOADS * (each + touched)
    return (
        *(
            made(
                "encode",
                {"grad": grad, "e_in": rest, "e_out": rest, "payload": "u8"},
                _NBYTES[grad] + 2 * _NBYTES[rest] + each,
                feedback,
            )
            for grad, rest in (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "bf16"))
        ),
        # The sum is formed in the cache: device memory sees it once, where e_out is fp32 as the new residual.
        *(
            made(
                "reencode",
                {"payloads": "u8", "sums": "fp32", "e_in": rest, "e_out": rest, "payload": "u8"},
                8 + (1 + PAYLOADS) * each,
                feedback,
            )
            for rest in ("fp32", "bf16")
        ),
        made("decode", {"payloads": "u8", "out": "fp32"}, summed, {"CLEAR": 0}),
        made("decode", {"payloads": "u8", "out": "fp32"}, 4 + summed, {"CLEAR": 1}),
    )
