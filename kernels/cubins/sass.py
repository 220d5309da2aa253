"""Machine code as nvdisasm prints it: instructions, loops, and which pipe each goes to."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Code", "Instruction", "parse", "pipe"]

_LINE = re.compile(
    r"^\s+/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.:]*)\s*(?P<rest>[^;]*);"
)
_LABEL = re.compile(r"^\.(?P<name>L_x_\d+):")
_TARGET = re.compile(r"`\(\.(L_x_\d+)\)")
_PIPES = {
    "fp32": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 FADD32I FMUL32I HADD2 HMUL2 HFMA2 FSWZADD",
    "imad": "IMAD IDP",
    "xu": "MUFU F2I I2F F2F FRND POPC FLO BREV REDUX CREDUX I2I",
    "lsu": "LDG STG LD ST LDS STS LDSM STSM LDL STL LDGSTS SHFL ATOM ATOMS ATOMG RED MATCH",
    "issue": "BRA EXIT BSSY BSYNC BREAK BAR MEMBAR ERRBAR CGAERRBAR CCTL NOP WARPSYNC NANOSLEEP DEPBAR LDGDEPBAR"
    " YIELD BMOV S2R S2UR CS2R LDC LDCU VOTEU R2UR RET CALL ACQBULK PREEXIT",
}
_PIPE_OF = {opcode: name for name, opcodes in _PIPES.items() for opcode in opcodes.split()}


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """``opcode`` with its modifiers (``LDG.E.128``); ``guard``: the predicate it runs under, if any."""

    opcode: str
    guard: str
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Code:
    """``instructions``: those that are reached, without what only a diverged warp executes; ``loops``: of them;
    ``looped``: those that stand in one."""

    instructions: tuple[Instruction, ...]
    loops: int
    looped: tuple[Instruction, ...]


def parse(text: str) -> Code:
    """The code of a disassembly.

    For shuffles and votes the compiler adds slow paths out of line, entered by ``BRA.DIV`` by warps whose threads are
    apart. Padding after the last exit is not reached either.
    """
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if (label := _LABEL.match(line)) is not None:
            waiting.append(label["name"])
        elif (m := _LINE.match(line)) is not None:
            labels.update(dict.fromkeys(waiting, len(found)))
            waiting = []
            found.append(Instruction(opcode=m["opcode"], guard=m["guard"] or "", operands=m["rest"].strip()))
    follow = [_successors(i, one, labels, len(found)) for i, one in enumerate(found)]
    reached, back = _walk(follow)
    repeated = _bodies(follow, reached, back)
    return Code(
        instructions=tuple(one for i, one in enumerate(found) if i in reached),
        loops=len(back),
        looped=tuple(one for i, one in enumerate(found) if i in repeated),
    )


def _successors(i: int, one: Instruction, labels: dict[str, int], count: int) -> list[int]:
    target = _TARGET.search(one.operands)
    jumps = one.base in ("BRA", "JMP", "CALL") and not one.opcode.startswith("BRA.DIV") and target is not None
    always = not one.guard and (not jumps or one.operands.startswith("`"))
    ends = one.base in ("EXIT", "RET") or (jumps and one.base != "CALL")
    onward = [] if (ends and always) or i + 1 == count else [i + 1]
    return onward + ([labels[target[1]]] if jumps and target is not None else [])


def _walk(follow: list[list[int]]) -> tuple[set[int], list[tuple[int, int]]]:
    """What is reached from the first, and the edges that lead back to where the walk came from (Tarjan 1972)."""
    reached: set[int] = set()
    above: set[int] = set()
    back: list[tuple[int, int]] = []
    stack = [(-1, 0, False)] if follow else []
    while stack:
        came, i, done = stack.pop()
        if done:
            above.discard(i)
        elif i in above:
            back.append((came, i))
        elif i not in reached:
            reached.add(i)
            above.add(i)
            stack.append((came, i, True))
            stack.extend((i, to, False) for to in follow[i])
    return reached, back


def _bodies(follow: list[list[int]], reached: set[int], back: list[tuple[int, int]]) -> set[int]:
    """All loops' bodies: what comes to a loop's last instruction without passing its first."""
    before: dict[int, list[int]] = {}
    for i in reached:
        for to in follow[i]:
            before.setdefault(to, []).append(i)
    repeated: set[int] = set()
    for last, first in back:
        body, stack = {first}, [last]
        while stack:
            i = stack.pop()
            if i not in body:
                body.add(i)
                stack.extend(before.get(i, ()))
        repeated |= body
    return repeated


def pipe(instruction: Instruction) -> str:
    """``fp32``, ``imad``, ``xu`` (conversions, counts, reductions of a warp), ``lsu`` (memory, shuffles), ``alu``, or
    ``issue`` for what only takes an issue slot, as the instructions of the uniform path do.
    """
    base = instruction.base
    if base in _PIPE_OF:
        return _PIPE_OF[base]
    return "issue" if base.startswith("U") else "alu"
