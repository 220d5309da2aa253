"""What a reduction does with the ranks' elements, and which dtypes it takes.

Sums are formed in the order that the plan fixes, so every rank has the same bits in every run. bfloat16 and float16
are combined in float32 and rounded once per step of the plan; integers wrap; a NaN makes the minimum and the
maximum NaN, as in torch. Booleans follow torch: a sum is "any", a product "all".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hybridcomm.errors import DataTypeError, UnsupportedError

__all__ = ["Op", "PremulSum", "check", "check_factor", "premul_sum", "resolve"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PremulSum:
    """A sum of inputs that each rank multiplies by its own ``factor`` first; made by `premul_sum`."""

    factor: float


Op = str | PremulSum | Any
"""A name ("sum", "avg" or "mean", "min", "max", "product", "band", "bor", "bxor"), a `PremulSum`, or torch's
``ReduceOp``."""

_NAMES = ("sum", "mean", "min", "max", "product", "band", "bor", "bxor", "premul_sum")
_ALIASES = {"avg": "mean", "prod": "product"}
_BITWISE = ("band", "bor", "bxor")
_ORDERED = ("min", "max", "product")
_FLOATS = ("float32", "bfloat16", "float16", "float64")
_COMPLEX = ("complex64", "complex128")
_BYTES = ("float8_e4m3fn", "float8_e5m2")


def premul_sum(factor: float) -> PremulSum:
    """The sum of every rank's ``factor`` times its input, as NCCL's ``ncclRedOpCreatePreMulSum``.

    The factor may differ between ranks. Products are rounded to the tensor's dtype before they are summed; an
    integer tensor needs a whole factor.
    """
    return PremulSum(factor=float(factor))


def resolve(op: Op) -> tuple[str, float | None]:
    """(canonical name, factor of a premul_sum) of what a caller passed as ``op=``."""
    if isinstance(op, PremulSum):
        return "premul_sum", op.factor
    name = op if isinstance(op, str) else str(op).removeprefix("RedOpType.").lower()
    name = _ALIASES.get(name, name)
    if name == "premul_sum":
        raise UnsupportedError(f"op={op!r}: pass hybridcomm.premul_sum(factor), which holds the factor")
    if name not in _NAMES:
        raise UnsupportedError(
            f"op={op!r}: choose one of avg, {', '.join(_NAMES[:-1])} or premul_sum(factor)"
        )
    return name, None


def check_factor(factor: float, dtype: str) -> None:
    """Raises `UnsupportedError` for a fraction as the factor of integers."""
    if dtype.startswith(("int", "uint")) and factor != int(factor):
        raise UnsupportedError(f"premul_sum({factor}) of {dtype}: an integer tensor needs a whole factor")


def check(op: str, dtype: str) -> None:
    """Raises `UnsupportedError` or `DataTypeError` unless elements of ``dtype`` can be combined by ``op``."""
    if op not in _NAMES:
        raise UnsupportedError(f"op={op!r}: plans reduce by {', '.join(_NAMES)}")
    if dtype in _BYTES:
        raise DataTypeError(
            f"{dtype} tensors are moved, never combined: reduce them as float32 or bfloat16, "
            "or use compress= to send fp8 on the slow link"
        )
    if op == "mean" and dtype not in _FLOATS + _COMPLEX:
        raise UnsupportedError(f"op='mean' of {dtype}: use op='sum' and divide by the world size")
    if op in _BITWISE and dtype in _FLOATS + _COMPLEX:
        raise UnsupportedError(f"op={op!r} of {dtype}: bitwise operations take integers and bool")
    if op in _ORDERED and dtype in _COMPLEX:
        raise UnsupportedError(f"op={op!r} of {dtype}: complex tensors can be summed or averaged only")
    if op == "premul_sum" and dtype == "bool":
        raise UnsupportedError("op=premul_sum of bool: a factor needs numbers; use op='sum'")
