"""Are a device plan's waits enough, and is any of them more than enough? Vector clocks, without data.

What an operation knows to be over: what stands before it on its stream, what it waits for, and what these knew (Fidge
1988, Mattern 1989). Two operations that touch the same bytes, one of them writing, must know of each other. A wait for
what an operation knows already is superfluous. Neighbours of one NCCL group are one operation: what one waits for, all
have waited for, whoever waits for one waits for all, and they run beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hybridcomm.errors import PlanError

if TYPE_CHECKING:
    from hybridcomm.device_plan import Operation

__all__ = ["check_operations", "pruned"]

_START = -1


def check_operations(operations: Sequence[Operation], name: Callable[[int], str]) -> list[tuple[int, int]]:
    """Raises `PlanError` where a wait is missing; returns the superfluous ones as (operation, after)."""
    known, superfluous = _clocks(operations)
    for place, op in enumerate(operations):
        if _START not in known[place]:
            raise PlanError(f"operation {place}: does not wait for the caller's stream: {op.describe(name)}")
        for before in range(place):
            if before in known[place]:
                continue
            conflict = _conflict(operations[before], op)
            if conflict is not None:
                raise PlanError(
                    f"operation {place} needs {before} first, as both touch {name(conflict)}:\n"
                    f"    {before} {operations[before].describe(name)}\n    {place} {op.describe(name)}"
                )
    return superfluous


def pruned(operations: Sequence[Operation]) -> list[tuple[int, ...]]:
    """What each operation still has to wait for without the superfluous waits."""
    _, superfluous = _clocks(operations)
    drop = set(superfluous)
    return [
        tuple(before for before in op.after if (place, before) not in drop)
        for place, op in enumerate(operations)
    ]


def _clocks(operations: Sequence[Operation]) -> tuple[list[set[int]], list[tuple[int, int]]]:
    """What is over before each operation begins, and the superfluous waits."""
    known: list[set[int]] = []
    behind: list[set[int]] = []  # what whoever waits for an operation knows
    superfluous: list[tuple[int, int]] = []
    latest: dict[str, set[int]] = {}  # of a stream: what whoever comes next on it knows
    place = 0
    while place < len(operations):
        end = _end_of_group(operations, place)
        knows = set(latest.get(operations[place].stream, set()))
        waits = [(before, member) for member in range(place, end) for before in operations[member].after]
        # The latest first: what it knew may make an earlier one superfluous.
        for before, member in sorted(waits, key=lambda wait: (-wait[0], wait[1])):
            if not _START <= before < place:
                raise PlanError(f"operation {member} waits for {before}, which does not come before it")
            if before in knows:
                superfluous.append((member, before))
            else:
                knows |= {_START} if before == _START else behind[before]
        after = knows | set(range(place, end))
        known += [knows] * (end - place)
        behind += [after] * (end - place)
        latest[operations[place].stream] = after
        place = end
    return known, sorted(superfluous)


def _end_of_group(operations: Sequence[Operation], begin: int) -> int:
    end = begin + 1
    if operations[begin].group == -1:
        return end
    while end < len(operations) and operations[end].group == operations[begin].group:
        end += 1
    return end


def _conflict(one: Operation, other: Operation) -> int | None:
    """An address that both touch, one of them writing; None if there is none."""
    for left in one.touches:
        for right in other.touches:
            if (left.write or right.write) and left.begin < right.end and right.begin < left.end:
                return max(left.begin, right.begin)
    return None
