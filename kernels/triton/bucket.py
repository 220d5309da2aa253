"""What is built beforehand of ``jit/bucket.py``: into a bucket and out of it again, by the bucket's type."""

from __future__ import annotations

from hybridcomm.kernels.device import Argument, DeviceKernel
from hybridcomm.kernels.instructions import budget
from hybridcomm.kernels.triton.function import Function

__all__ = ["CHUNK", "FUNCTION", "KERNELS", "WARPS"]

CHUNK = 4096
"""Elements per program."""

WARPS = 4

FUNCTION = Function(module="bucket", name="bucket_kernel", arguments=("table", "bucket", "scale"))


def _shipped(into: bool, kind: str) -> DeviceKernel:
    """Budgets are for tensors of fp32; ``cold`` has the code of all six cases, of which a program runs one."""
    size = 4 if kind == "fp32" else 2
    name = f"bucket_{'pack' if into else 'unpack'}_{kind}"
    return DeviceKernel(
        name=name,
        source=FUNCTION.source,
        function=FUNCTION.name,
        arguments=(
            Argument(name="table", type="*i64"),
            Argument(name="bucket", type=f"*{kind}"),
            Argument(name="scale", type="fp32", aligned=False),
        ),
        constants=(("CHUNK", CHUNK), ("INTO", int(into))),
        num_warps=WARPS,
        elements=CHUNK,
        budget=budget(name, nbytes=1.02 * (4 + size), registers=128),
    )


KERNELS = tuple(_shipped(into, kind) for into in (True, False) for kind in ("fp32", "bf16", "fp16"))
