"""What is built beforehand of ``jit/withdraw.py``: the pass behind every encoder."""

from __future__ import annotations

from hybridcomm.kernels.device import Argument, DeviceKernel
from hybridcomm.kernels.instructions import budget
from hybridcomm.kernels.triton.function import Function

__all__ = ["ELEMENTS", "FUNCTION", "KERNELS", "WARPS"]

ELEMENTS = 1 << 14
"""Elements per program."""

WARPS = 4

FUNCTION = Function(
    module="withdraw",
    name="withdraw_kernel",
    arguments=("e_in", "e_out", "payload", "nwords", "numel", "checksum"),
)


def _shipped(rest: str) -> DeviceKernel:
    """Budgets are for payloads that are not flagged, of which a program reads four bytes."""
    arrays = {"e_in": f"*{rest}", "e_out": f"*{rest}", "payload": "*u8"}
    name = f"withdraw_{rest}"
    return DeviceKernel(
        name=name,
        source=FUNCTION.source,
        function=FUNCTION.name,
        arguments=tuple(
            Argument(name=each, type=arrays.get(each, "i64"), aligned=each in arrays)
            for each in FUNCTION.arguments
        ),
        constants=(("HAS_IN", 1), ("HAS_OUT", 1)),
        num_warps=WARPS,
        elements=ELEMENTS,
        budget=budget(name, nbytes=0.05, registers=64),
    )


KERNELS = tuple(_shipped(rest) for rest in ("fp32", "bf16"))
