"""Planted bugs: each barrier deleted, a sample of instructions changed; who notices, and who cannot be noticed.

A mutant is an ``Entry`` with one instruction changed. ``judge`` runs the caller's check on it and says what came of it:
a ``Reason`` of the executor, ``wrong result``, or ``survived``. A survivor is a gap in the checks or the same program
in other words: ``orders_nothing`` and ``never_read`` prove the latter from the text, all else is for a
person to examine.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tests.ptx import access, compute, flow
from tests.ptx.errors import PtxError, Reason
from tests.ptx.operands import Address, Immediate, Operand
from tests.ptx.parse import Entry, Instruction

__all__ = [
    "Mutant",
    "Verdict",
    "barrier_mutants",
    "judge",
    "never_read",
    "opcode_mutants",
    "orders_nothing",
    "tally",
]

SURVIVED, WRONG = "survived", "wrong result"
_SWAPS = (
    (r"^add\.", "sub."),
    (r"^sub\.", "add."),
    (r"^min\.", "max."),
    (r"^max\.", "min."),
    (r"^and\.", "or."),
    (r"^or\.", "and."),
    (r"^xor\.", "and."),
    (r"^shl\.b", "shr.u"),
    (r"^shr\.[us]", "shl.b"),
    (r"^mul\.rn\.", "add.rn."),
    (r"^mul\.lo\.", "add."),
    (r"^popc\.", "clz."),
    (r"^abs\.f", "neg.f"),
    (r"^setp\.lt\.", "setp.le."),
    (r"^setp\.le\.", "setp.lt."),
    (r"^setp\.gt\.", "setp.ge."),
    (r"^setp\.ge\.", "setp.gt."),
    (r"^setp\.eq\.", "setp.ne."),
    (r"^setp\.ne\.", "setp.eq."),
    (r"^setp\.lt\.", "setp.ge."),
    (r"^setp\.gt\.", "setp.le."),
    (r"^redux\.sync\.add\.", "redux.sync.max."),
    (r"^redux\.sync\.max\.", "redux.sync.min."),
    (r"^shfl\.sync\.up\.", "shfl.sync.down."),
    (r"^shfl\.sync\.bfly\.", "shfl.sync.up."),
    (r"^atom\.(.*)\.add\.u", r"atom.\1.max.u"),
    (r"^atom\.(.*)\.or\.b", r"atom.\1.and.b"),
)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """``index``: of the instruction; ``what``: how it was changed."""

    entry: Entry
    index: int
    what: str

    @property
    def original(self) -> Instruction:
        return self.entry.instructions[self.index]

    def __str__(self) -> str:
        return f"line {self.original.line}: {self.original.text} -> {self.what}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    mutant: Mutant
    outcome: str

    @property
    def caught(self) -> bool:
        return self.outcome != SURVIVED


def _with(entry: Entry, index: int, instruction: Instruction, what: str) -> Mutant:
    """The text stays that of the original, so that findings can be compared with it."""
    changed = (*entry.instructions[:index], instruction, *entry.instructions[index + 1 :])
    return Mutant(entry=replace(entry, instructions=changed), index=index, what=what)


def _deleted(entry: Entry, index: int) -> Mutant:
    gone = replace(entry.instructions[index], mnemonic="nop", operands=(), guard=None)
    return _with(entry, index, gone, "deleted")


def barrier_mutants(entry: Entry) -> list[Mutant]:
    """Each barrier of a CTA or a warp deleted."""
    return [
        _deleted(entry, i)
        for i, instruction in enumerate(entry.instructions)
        if flow.ending_of(instruction) == "barrier"
        or instruction.mnemonic in ("bar.warp.sync", "barrier.warp.sync")
    ]


def _changed_operands(instruction: Instruction) -> Iterator[tuple[tuple[Operand, ...], str]]:
    operands = instruction.operands
    for i, operand in enumerate(operands):
        changed: Operand | None = None
        if (
            isinstance(operand, Immediate)
            and not operand.float_bits
            and instruction.opcode not in ("shfl", "redux")
        ):
            changed = Immediate(operand.value + 1)
        elif isinstance(operand, Immediate) and operand.float_bits == 32:
            changed = Immediate(operand.value ^ 1 << 22, 32)
        elif isinstance(operand, Address) and access.space_of(instruction) in ("shared", "global"):
            changed = Address(operand.base, operand.offset + 4)
        if changed is not None:
            yield (*operands[:i], changed, *operands[i + 1 :]), f"operand {i} plus one step"
    if len(operands) >= 3 and instruction.opcode in ("sub", "selp", "prmt"):
        yield (operands[0], operands[2], operands[1], *operands[3:]), "operands swapped"


def _changes(instruction: Instruction) -> Iterator[tuple[Instruction, str]]:
    for pattern, replacement in _SWAPS:
        mnemonic = re.sub(pattern, replacement, instruction.mnemonic)
        if mnemonic != instruction.mnemonic and (
            mnemonic in compute.table() or mnemonic[:4] in ("redu", "shfl", "atom")
        ):
            yield replace(instruction, mnemonic=mnemonic), mnemonic
    if flow.ending_of(instruction) != "barrier":
        for operands, what in _changed_operands(instruction):
            yield replace(instruction, operands=operands), what
        if instruction.guard is not None:
            yield replace(instruction, negated=not instruction.negated), "guard negated"
            if flow.ending_of(instruction) == "fall":
                yield replace(instruction, guard=None), "guard dropped"


def opcode_mutants(entry: Entry, *, count: int, seed: int) -> list[Mutant]:
    """A sample: instructions drawn without repetition, one of their changes each."""
    draw = random.Random(seed)
    order = list(range(len(entry.instructions)))
    draw.shuffle(order)
    found: list[Mutant] = []
    for index in order:
        choices = list(_changes(entry.instructions[index]))
        if choices and len(found) < count:
            found.append(_with(entry, index, *draw.choice(choices)))
    return found


def judge(mutant: Mutant, check: Callable[[Entry], bool]) -> Verdict:
    """``check``: whether the results are right; it may raise a PtxError.

    Raises:
        PtxError: the mutant is not even a program: a mistake of the harness, not a catch.
    """
    try:
        outcome = SURVIVED if check(mutant.entry) else WRONG
    except PtxError as error:
        if error.reason in (Reason.SYNTAX, Reason.UNSUPPORTED, Reason.ARGUMENTS):
            raise
        outcome = error.reason.value
    return Verdict(mutant=mutant, outcome=outcome)


def tally(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many of each outcome, most frequent first."""
    return dict(Counter(verdict.outcome for verdict in verdicts).most_common())


def never_read(mutant: Mutant) -> bool:
    """Whether what the changed instruction computes is overwritten or forgotten on every path before it is read."""
    results = flow.destinations(mutant.original)
    if not results or mutant.original.opcode in ("atom", "ld"):
        return False
    return not flow.live_after(mutant.entry, flow.blocks_of(mutant.entry), mutant.index).intersection(results)


def _touches(entry: Entry, blocks: Sequence[flow.Block], number: int) -> set[tuple[str, bool]]:
    """(space, whether it writes) of the plain accesses in a block; atomics need no barrier among themselves."""
    found = set()
    for instruction in entry.instructions[blocks[number].first : blocks[number].last]:
        space = access.space_of(instruction)
        if instruction.opcode in ("ld", "ldmatrix", "st", "stmatrix") and space in ("shared", "global"):
            found.add((space, instruction.opcode.startswith("st")))
        elif instruction.opcode in ("atom", "red") and space == "shared":
            found.add((space, True))
    return found


def _until_barrier(
    entry: Entry, blocks: tuple[flow.Block, ...], start: int, backwards: bool
) -> set[tuple[str, bool]]:
    """What may be touched between the barrier block ``start`` and the barriers next to it."""
    edges: dict[int, set[int]] = {i: set() for i in range(len(blocks))}
    for i in range(len(blocks)):
        for after in flow.successors(blocks, entry, i):
            edges[after if backwards else i].add(i if backwards else after)
    seen, pending, found = set(), list(edges[start]), set()
    while pending:
        number = pending.pop()
        if number in seen or blocks[number].ending == "barrier":
            continue
        seen.add(number)
        found |= _touches(entry, blocks, number)
        pending += edges[number]
    return found


def orders_nothing(entry: Entry, index: int) -> bool:
    """Whether the barrier at ``index`` separates no write from any other plain access of the same space."""
    blocks = flow.blocks_of(entry)
    number = next(i for i, block in enumerate(blocks) if block.first <= index < block.last)
    before, after = (_until_barrier(entry, blocks, number, backwards) for backwards in (True, False))
    return not any(a == b and (x or y) for a, x in before for b, y in after)
