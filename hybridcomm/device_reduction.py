"""What a reduction is to NCCL: its operation, and by what each rank's input is multiplied before it goes in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hybridcomm import reduction
from hybridcomm.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from hybridcomm.reduction import Op

__all__ = ["factor_of", "fields_of", "shared"]


def fields_of(op: Op, tensor: torch.Tensor, dtype: str, world_size: int) -> dict[str, Any]:
    """Of an `Operation` that reduces tensors of ``dtype``; raises `UnsupportedError` for what NCCL has not."""
    name, factor = reduction.resolve(op)
    reduction.check(name, dtype)
    if name in ("band", "bor", "bxor"):
        raise UnsupportedError(f"op={op!r} on a GPU: NCCL has sum, avg, min, max, product and premul_sum")
    if factor is not None:
        return {"op": "sum", "factor": factor_of(factor, tensor, dtype)}
    return {"op": "sum", "divisor": world_size} if name == "mean" else {"op": name}


def factor_of(factor: float, tensor: torch.Tensor, dtype: str) -> float:
    """Of a premul_sum; refused where NCCL, which takes it as an element, would round it, and hosts do not."""
    reduction.check_factor(factor, dtype)
    narrow = tensor.is_floating_point() and tensor.element_size() == 2
    taken = tensor.new_tensor(factor, device="cpu").item() if narrow else factor
    if taken != factor and not math.isnan(factor):
        instead = (
            "a smaller one, or multiply first"
            if math.isinf(taken)
            else f"one that it can be, such as {taken}"
        )
        raise UnsupportedError(
            f"premul_sum({factor}) of {dtype} on a GPU: NCCL takes the factor as such an element; pass {instead}"
        )
    return factor


def shared(fields: dict[str, Any]) -> list[tuple[str, Any]]:
    """What all ranks say alike of an operation's ``fields``: each has a factor of its own."""
    return sorted((name, "its own" if name == "factor" else value) for name, value in fields.items())
