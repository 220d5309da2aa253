"""What can be wrong with a kernel, as one exception that says where."""

from __future__ import annotations

import enum

__all__ = ["AccessError", "PtxError", "Reason"]


class Reason(enum.Enum):
    """Kinds of findings; the mutation harness counts by them."""

    SYNTAX = "syntax"
    UNSUPPORTED = "unsupported"
    ARGUMENTS = "arguments"
    OUT_OF_BOUNDS = "out of bounds"
    MISALIGNED = "misaligned"
    UNINITIALISED = "uninitialised read"
    SHARED_RACE = "shared race"
    GLOBAL_RACE = "global race"
    DIVERGENT_BARRIER = "divergent barrier"
    DIVERGENT_WARP = "divergent warp"
    DEADLOCK = "deadlock"
    LIMIT = "instruction limit"
    UNDEFINED = "undefined result"
    TRAP = "trap"


class PtxError(Exception):
    """A finding: its ``reason``, the PTX ``line`` and, where threads ran, ``cta`` and ``thread`` (flat numbers)."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        line: int = 0,
        text: str = "",
        cta: int | None = None,
        thread: int | None = None,
    ) -> None:
        who = "" if cta is None else f", CTA {cta}, thread {thread}"
        where = f" (PTX line {line}{who}: {text})" if line else ""
        super().__init__(f"{reason.value}: {message}{where}")
        self.reason = reason
        self.line = line
        self.cta = cta
        self.thread = thread


class AccessError(Exception):
    """A finding by a part that knows no instruction: ``position`` counts in the lanes which it was given."""

    def __init__(self, reason: Reason, message: str, position: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.position = position
