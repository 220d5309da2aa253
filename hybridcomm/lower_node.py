"""What lowering looks up in a rank's steps inside its node: their order, and which sums go straight to the peers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridcomm.plan import Step

__all__ = ["delivered", "hand_out_first"]


def hand_out_first(steps: Sequence[Step], rank: int) -> list[Step]:
    """Steps in the order in which their operations are tried: what ``rank`` only hands to others comes first.

    Otherwise it might sum a chunk of its own first, while another rank waits for what it has ready.
    """
    reduces = [step for step in steps if step.op == "reduce"]
    if any(step.after for step in reduces):  # a lane's order is the plan's
        return list(steps)
    first = [step for step in reduces if step.root != rank]
    return [*first, *(step for step in steps if step.op != "reduce" or step.root == rank)]


def delivered(steps: Sequence[Step], rank: int) -> set[int]:
    """The reduces of ``rank``, and their gathers, whose result goes straight to the others of the group.

    That is where a gather of the same region to the same ranks waits for nothing but the reduce. The engine
    remembers who got it from one to the other first in, first out, so both must come in one order.
    """
    own = [step for step in steps if step.root == rank and step.op in ("reduce", "gather")]
    reduces = {step.id: step for step in own if step.op == "reduce"}
    pairs = []
    for step in own:
        before = reduces.get(step.after[0]) if step.op == "gather" and len(step.after) == 1 else None
        if before is not None and (before.region, before.group) == (step.region, step.group):
            pairs.append((before.id, step.id))
    if pairs != sorted(pairs) or len({before for before, _ in pairs}) != len(pairs):
        return set()
    return {step for pair in pairs for step in pair}
