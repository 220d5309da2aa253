"""setp, from comparisons of any type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.ptx.operation import Operation

__all__ = ["COMPARISONS", "set_predicates"]

COMPARISONS: dict[str, Any] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def set_predicates(comparisons: Iterator[tuple[str, str, Any]]) -> Iterator[tuple[str, Operation]]:
    """setp with and without a third predicate; the second destination has the comparison negated."""
    for name, t, compare in comparisons:
        yield (
            f"setp.{name}.{t}",
            Operation(
                result="pred", sources=(t, t), function=compare, second=lambda a, b, f=compare: ~f(a, b)
            ),
        )
        for word, combine in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
            yield (
                f"setp.{name}.{word}.{t}",
                Operation(
                    result="pred",
                    sources=(t, t, "pred"),
                    function=lambda a, b, c, f=compare, g=combine: g(f(a, b), c),
                    second=lambda a, b, c, f=compare, g=combine: g(~f(a, b), c),
                ),
            )
