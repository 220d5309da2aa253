"""What the parameter tables and budgets of the kernels in CUDA C++ are made of."""

from __future__ import annotations

from hybridcomm.kernels.device import Argument

__all__ = ["BYTES", "NUMEL", "SLACK", "pointers", "scalars"]

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Of an element."""

SLACK = 1.02
"""What may be moved, per byte that has to be."""

NUMEL = (Argument(name="numel", type="i64"),)


def pointers(**types: str) -> tuple[Argument, ...]:
    """Device addresses, multiples of 16."""
    return tuple(Argument(name=name, type=f"*{kind}") for name, kind in types.items())


def scalars(**types: str) -> tuple[Argument, ...]:
    """Numbers of which nothing is promised."""
    return tuple(Argument(name=name, type=kind, aligned=False) for name, kind in types.items())
