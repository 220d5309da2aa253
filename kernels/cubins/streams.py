"""Which parameter each access to global memory in a PTX text goes through, and how wide it is.

A pointer is followed from ``ld.param`` through moves and arithmetic to the address of a load or store. What is loaded
from memory is no pointer here: addresses that went through shared memory have no known origin.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Access", "accesses", "instructions"]

_STATEMENT = re.compile(
    r"^(?:@(?P<guard>!?%p\d+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)$", re.DOTALL
)
_REGISTER = re.compile(r"%[a-z]+\d+")
_LABEL = re.compile(r"^(\$L\w+):")
_WIDTH = re.compile(r"(?:\.v([248]))?\.[bsuf](8|16|32|64|128)$")


@dataclass(frozen=True, kw_only=True)
class Access:
    """``parameters``: indices of those that its address may come from; ``nbytes`` per thread.

    ``guarded``: runs under a predicate, or in code that a branch may jump over.
    """

    parameters: frozenset[int]
    store: bool
    guarded: bool
    nbytes: int


def _skippable(text: str) -> list[bool]:
    """For each instruction, whether it lies between a branch and a later label that the branch jumps to."""
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    count = 0
    for statement in _statements(text):
        if (label := _LABEL.match(statement)) is not None:
            labels[label[1]] = count
        elif (told := _STATEMENT.match(statement)) is not None:
            if told["opcode"].startswith("bra"):
                branches.append((count, told["operands"].strip()))
            count += 1
    jumped = [False] * count
    for at, name in branches:
        for i in range(at + 1, labels.get(name, 0)):
            jumped[i] = True
    return jumped


def _statements(text: str) -> Iterator[str]:
    body = text[text.index("{") + 1 :] if "{" in text else ""
    for part in re.split(r";|(?<=:)\s*\n", body):
        yield part.strip().lstrip("{}").strip()


def instructions(text: str) -> Iterator[tuple[str, str, str]]:
    """(guard, opcode, operands) of each instruction of the kernel's body."""
    for statement in _statements(text):
        told = _STATEMENT.match(statement)
        if told is not None:
            yield told["guard"] or "", told["opcode"], told["operands"]


def _destinations(opcode: str, operands: str) -> tuple[list[str], list[str]]:
    """Registers written and read."""
    if opcode.startswith(("st.", "red.", "bra", "bar", "ret", "setp")):
        return [], _REGISTER.findall(operands)
    first, _, rest = operands.partition("}," if operands.startswith("{") else ",")
    return _REGISTER.findall(first), _REGISTER.findall(rest)


def accesses(text: str) -> tuple[Access, ...]:
    """Every load from and store to global memory, in the order of the text."""
    body = list(instructions(text))
    came: dict[str, frozenset[int]] = {}
    grown = True
    while grown:  # until nothing changes: loops carry pointers backwards
        grown = False
        for _, opcode, operands in body:
            written, read = _destinations(opcode, operands)
            parameter = re.search(r"_param_(\d+)\]", operands) if opcode.startswith("ld.param") else None
            if parameter is not None:
                origin = frozenset([int(parameter[1])])
            elif opcode.startswith(("ld.", "atom.", "setp")):
                continue
            else:
                origin = frozenset().union(*(came.get(register, frozenset()) for register in read))
            for register in written:
                if not origin <= came.get(register, frozenset()):
                    came[register] = came.get(register, frozenset()) | origin
                    grown = True
    found = []
    for (guard, opcode, operands), skippable in zip(body, _skippable(text), strict=True):
        width = _WIDTH.search(opcode)
        if not opcode.startswith(("ld.global", "st.global")) or width is None:
            continue
        address = re.search(r"\[\s*([^\]]*)\]", operands)
        registers = _REGISTER.findall(address[1]) if address is not None else []
        found.append(
            Access(
                parameters=frozenset().union(*(came.get(register, frozenset()) for register in registers)),
                store=opcode.startswith("st."),
                guarded=bool(guard) or skippable,
                nbytes=int(width[1] or 1) * int(width[2]) // 8,
            )
        )
    return tuple(found)
