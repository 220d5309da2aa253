"""Basic blocks of an entry, and which registers may be read before anything was written to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tests.ptx.errors import PtxError, Reason
from tests.ptx.lanes import is_collective
from tests.ptx.operands import Pair, Register, Symbol, Vector
from tests.ptx.parse import Entry, Instruction, registers_in

__all__ = [
    "Block",
    "Ending",
    "blocks_of",
    "destinations",
    "doubtful_reads",
    "ending_of",
    "live_after",
    "sources",
]

Ending = Literal["fall", "branch", "index", "exit", "barrier"]
_WITHOUT_RESULT = {
    "st",
    "red",
    "bra",
    "brx",
    "ret",
    "exit",
    "bar",
    "barrier",
    "membar",
    "fence",
    "trap",
    "cp",
    "stmatrix",
}
_BARRIERS = {"bar.sync", "barrier.sync", "barrier.sync.aligned", "bar.cta.sync", "barrier.cta.sync"}
_BARRIERS |= {"barrier.cta.sync.aligned"}


@dataclass(frozen=True, kw_only=True)
class Block:
    """Instructions ``first`` to ``last`` (exclusive), run by lanes together. The last one is the ending, if not "fall".

    ``collective``: begins with an instruction where lanes of a warp meet. ``targets``: blocks of a branch, of an
    indexed one as many as its table has.
    """

    first: int
    last: int
    ending: Ending
    targets: tuple[int, ...]
    collective: bool


def ending_of(instruction: Instruction) -> Ending:
    """How an instruction leaves the straight line."""
    if instruction.mnemonic in ("bra", "bra.uni"):
        return "branch"
    if instruction.mnemonic in ("brx.idx", "brx.idx.uni"):
        return "index"
    if instruction.mnemonic in ("ret", "ret.uni", "exit"):
        return "exit"
    if instruction.mnemonic in _BARRIERS:
        return "barrier"
    return "fall"


def blocks_of(entry: Entry) -> tuple[Block, ...]:
    """All blocks, in the order of the text; the number of a block orders the scheduling.

    Raises:
        PtxError: a branch to nowhere, or an end of the text that is reached.
    """
    code = entry.instructions
    starts = {0, *entry.labels.values()}
    for i, instruction in enumerate(code):
        if ending_of(instruction) != "fall":
            starts.add(i + 1)
        if is_collective(instruction) or ending_of(instruction) == "barrier":
            starts.add(i)
    order = sorted(start for start in starts if start < len(code))
    number = {start: i for i, start in enumerate(order)}
    blocks = []
    for first, last in zip(order, [*order[1:], len(code)], strict=True):
        instruction = code[last - 1]
        blocks.append(
            Block(
                first=first,
                last=last,
                ending=ending_of(instruction),
                targets=tuple(number[start] for start in _targets(entry, instruction)),
                collective=is_collective(code[first]),
            )
        )
    final = code[-1]
    if blocks[-1].ending not in ("exit", "branch", "index") or final.guard is not None:
        raise final.error(Reason.SYNTAX, "the end of the text is reached")
    return tuple(blocks)


def _targets(entry: Entry, instruction: Instruction) -> tuple[int, ...]:
    """The instructions that a branch may lead to, none for anything else."""
    ending, operands = ending_of(instruction), instruction.operands
    if ending not in ("branch", "index"):
        return ()
    last = operands[-1] if len(operands) == (1 if ending == "branch" else 2) else None
    name = last.name if isinstance(last, Symbol) else ""
    labels = (name,) if ending == "branch" else entry.tables.get(name, ())
    found = tuple(entry.labels.get(label, len(entry.instructions)) for label in labels)
    if not found or max(found) >= len(entry.instructions):
        raise instruction.error(Reason.SYNTAX, "a branch to no label of this entry")
    return found


def destinations(instruction: Instruction) -> tuple[str, ...]:
    """Registers that an instruction writes."""
    if instruction.opcode in _WITHOUT_RESULT or not instruction.operands:
        return ()
    first = instruction.operands[0]
    return registers_in(first) if isinstance(first, (Register, Vector, Pair)) else ()


def sources(instruction: Instruction) -> tuple[str, ...]:
    """Registers that an instruction reads, its guard included."""
    skip = 0 if instruction.opcode in _WITHOUT_RESULT else 1
    read = [name for operand in instruction.operands[skip:] for name in registers_in(operand)]
    return tuple(dict.fromkeys([*read, *([instruction.guard] if instruction.guard else [])]))


def successors(blocks: tuple[Block, ...], entry: Entry, number: int) -> tuple[int, ...]:
    """Blocks that may run next."""
    block = blocks[number]
    guarded = entry.instructions[block.last - 1].guard is not None
    after = (number + 1,)
    if block.targets:
        return (*block.targets, *after) if guarded else block.targets
    if block.ending == "exit":
        return after if guarded else ()
    return after


def doubtful_reads(entry: Entry, blocks: tuple[Block, ...]) -> Mapping[int, tuple[str, ...]]:
    """For each instruction the registers that some path reaches unwritten, or written under a guard alone.

    A forward analysis of definite assignment; all else needs no check when it runs.
    """
    bit = {name: 1 << i for i, name in enumerate(entry.registers)}
    everything = (1 << len(bit)) - 1
    written = []
    for block in blocks:
        sure = 0
        for instruction in entry.instructions[block.first : block.last]:
            if instruction.guard is None:
                for name in destinations(instruction):
                    sure |= bit[name]
        written.append(sure)
    at_start = [0, *[everything] * (len(blocks) - 1)]
    pending = [0]
    reached = {0}
    while pending:
        number = pending.pop()
        for after in successors(blocks, entry, number):
            now = at_start[after] & (at_start[number] | written[number])
            if now != at_start[after] or after not in reached:
                at_start[after] = now
                reached.add(after)
                pending.append(after)
    found: dict[int, tuple[str, ...]] = {}
    for block, start in zip(blocks, at_start, strict=True):
        known = start
        for i in range(block.first, block.last):
            instruction = entry.instructions[i]
            doubtful = tuple(name for name in sources(instruction) if not known & bit[name])
            if doubtful:
                found[i] = doubtful
            if instruction.guard is None:
                for name in destinations(instruction):
                    known |= bit[name]
    return found


def _before(entry: Entry, first: int, last: int, live: set[str]) -> set[str]:
    """Registers that are read later, seen from in front of instructions ``first`` to ``last``."""
    live = set(live)
    for instruction in reversed(entry.instructions[first:last]):
        if instruction.guard is None:
            live -= set(destinations(instruction))
        live |= set(sources(instruction))
    return live


def live_after(entry: Entry, blocks: tuple[Block, ...], index: int) -> set[str]:
    """Registers that some path reads after instruction ``index`` without writing them first."""
    at_start: list[set[str]] = [set() for _ in blocks]
    changed = True
    while changed:
        changed = False
        for number in reversed(range(len(blocks))):
            block = blocks[number]
            ends = set().union(*(at_start[after] for after in successors(blocks, entry, number)))
            now = _before(entry, block.first, block.last, ends)
            changed |= now != at_start[number]
            at_start[number] = now
    number = next(i for i, block in enumerate(blocks) if block.first <= index < block.last)
    ends = set().union(*(at_start[after] for after in successors(blocks, entry, number)))
    return _before(entry, index + 1, blocks[number].last, ends)


@dataclass(frozen=True, kw_only=True)
class Program:
    """An entry, cut and analysed once for all launches; ``doubtful``: reads that are looked at when they happen."""

    entry: Entry
    blocks: tuple[Block, ...]
    doubtful: Mapping[int, tuple[str, ...]]


def compile_entry(entry: Entry) -> Program:
    """Raises PtxError for control flow that leads nowhere."""
    if not entry.instructions:
        raise PtxError(Reason.SYNTAX, f"{entry.name} has no instructions")
    blocks = blocks_of(entry)
    return Program(entry=entry, blocks=blocks, doubtful=doubtful_reads(entry, blocks))
