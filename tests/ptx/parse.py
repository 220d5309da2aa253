"""PTX text to instructions; what it does not know it refuses, with the line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.ptx import types
from tests.ptx.errors import PtxError, Reason
from tests.ptx.operands import Address, Operand, Pair, Register, Vector, parse_operand, split

__all__ = ["Entry", "Instruction", "Parameter", "SharedVariable", "parse"]

_BEGIN = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)(?P<directives>[^{]*)\{")
_LABEL = re.compile(r"\s*([$%\w]+)\s*:(?!:)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.+)", re.DOTALL)
_SHARED = re.compile(
    r"(?P<extern>\.extern\s+)?\.shared\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$%]+)"
    r"(?P<array>(?:\[\d*\])*)\s*"
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?P<pointer>\.ptr\s+(?:\.global\s+)?(?:\.align\s+\d+\s+)?)?(?P<name>[\w$]+)(?:\[(?P<count>\d+)\])?"
)
_INSTRUCTION = re.compile(
    r"(?:@(?P<not>!?)(?P<guard>[%\w$]+)\s+)?(?P<mnemonic>[a-z][\w.:]*)\s*(?P<rest>.*)", re.DOTALL
)
_LINES = {".version", ".target", ".address_size", ".file", ".loc", ".pragma"}  # that change no result


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction; ``mnemonic`` is its full spelling, such as ``add.rn.f32``."""

    line: int
    text: str
    mnemonic: str
    operands: tuple[Operand, ...]
    guard: str | None = None
    negated: bool = False

    @property
    def opcode(self) -> str:
        return self.mnemonic.split(".", 1)[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.mnemonic.split(".")[1:])

    def error(self, reason: Reason, message: str) -> PtxError:
        return PtxError(reason, message, line=self.line, text=self.text)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A kernel parameter in its place among the argument bytes."""

    name: str
    type: str
    offset: int
    nbytes: int
    pointer: bool


@dataclass(frozen=True, kw_only=True)
class SharedVariable:
    """Offset among the static shared bytes; ``nbytes`` None: what the launch brings, behind the static ones."""

    offset: int
    nbytes: int | None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A kernel: everything that running it needs."""

    name: str
    parameters: tuple[Parameter, ...]
    registers: Mapping[str, str]
    shared: Mapping[str, SharedVariable]
    static_shared: int
    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int] = field(default_factory=dict)
    tables: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Labels that an indexed branch chooses from."""
    block: int | None = None


def _error(message: str, line: int, text: str = "") -> PtxError:
    return PtxError(Reason.SYNTAX, message, line=line, text=" ".join(text.split()))


def _clean(text: str) -> str:
    """Without comments, line directives and debug sections; lines keep their numbers."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    lines = [line.split("//")[0] for line in text.split("\n")]
    kept = []
    for line in lines:
        first = line.split(maxsplit=1)[:1]
        if first == [".section"]:
            break
        kept.append("" if first and first[0] in _LINES else line)
    return "\n".join(kept)


def _parameters(text: str, line: int) -> tuple[Parameter, ...]:
    found, offset = [], 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        match = _PARAMETER.fullmatch(declaration)
        if not match:
            raise _error("a parameter that is not understood", line, declaration)
        size = types.bits(match["type"]) // 8
        nbytes = size * int(match["count"] or 1)
        align = int(match["align"] or size)
        offset = -(-offset // align) * align
        found.append(
            Parameter(
                name=match["name"],
                type=match["type"] if match["count"] is None else "bytes",
                offset=offset,
                nbytes=nbytes,
                pointer=bool(match["pointer"]),
            )
        )
        offset += nbytes
    return tuple(found)


class _Body:
    """Collects statements between the entry's braces; inner braces are scopes of registers."""

    def __init__(self, module: str) -> None:
        self.registers: dict[str, str] = {}
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.tables: dict[str, tuple[str, ...]] = {}
        self.shared: dict[str, SharedVariable] = {}
        self.static = 0
        self._scopes: list[dict[str, str]] = [{}]
        self._scope_count = 0
        for statement in module.split(";"):
            if ".shared" in statement and (match := _SHARED.search(statement)):
                self._declare_shared(match, 0)

    def _declare_shared(self, match: re.Match[str], line: int) -> None:
        size = types.bits(match["type"]) // 8
        align = int(match["align"] or size)
        if match["extern"] and match["array"].startswith("[]"):
            self.shared[match["name"]] = SharedVariable(offset=0, nbytes=None)
            return
        if match["extern"]:
            raise _error("external shared memory of a fixed size", line, match[0])
        for count in re.findall(r"\d+", match["array"]):
            size *= int(count)
        offset = -(-self.static // align) * align
        self.shared[match["name"]] = SharedVariable(offset=offset, nbytes=size)
        self.static = offset + size

    def open(self) -> None:
        self._scopes.append({})
        self._scope_count += 1

    def close(self) -> bool:
        """Whether this was the entry's own brace."""
        self._scopes.pop()
        return not self._scopes

    def _declare(self, kind: str, names: str, line: int) -> None:
        types.bits(kind)
        for name in (part.strip() for part in names.split(",")):
            match = re.fullmatch(r"([%\w$]+)(?:<(\d+)>)?", name)
            if not match:
                raise _error("a register that is not understood", line, name)
            for one in [f"{match[1]}{i}" for i in range(int(match[2]))] if match[2] else [match[1]]:
                unique = one if len(self._scopes) == 1 else f"{one}@{self._scope_count}"
                self._scopes[-1][one] = unique
                self.registers[unique] = kind

    def name_of(self, name: str) -> str | None:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), None)

    def statement(self, text: str, line: int) -> None:
        label = ""
        while match := _LABEL.match(text):
            label = match[1]
            self.labels[label] = len(self.instructions)
            line += text[: match.end()].count("\n")
            text = text[match.end() :]
        line += len(text) - len(text.lstrip()) and text[: len(text) - len(text.lstrip())].count("\n")
        text = " ".join(text.split())
        if not text:
            return
        if match := _REGISTERS.fullmatch(text):
            self._declare(match[1], match[2], line)
        elif match := _SHARED.fullmatch(text):
            self._declare_shared(match, line)
        elif text.startswith(".branchtargets ") and label:
            del self.labels[label]
            self.tables[label] = tuple(split(text.removeprefix(".branchtargets ")))
        elif text.startswith("."):
            raise _error("a directive that is not understood", line, text)
        else:
            self._instruction(text, line)

    def _instruction(self, text: str, line: int) -> None:
        match = _INSTRUCTION.fullmatch(text)
        if not match:
            raise _error("neither an instruction nor a directive", line, text)
        guard = match["guard"] and self.name_of(match["guard"])
        if match["guard"] and (guard is None or self.registers[guard] != "pred"):
            raise _error(f"{match['guard']} is no predicate", line, text)
        try:
            operands = tuple(parse_operand(part, self.name_of) for part in split(match["rest"]))
        except ValueError as problem:
            raise _error(str(problem), line, text) from problem
        self.instructions.append(
            Instruction(
                line=line,
                text=text,
                mnemonic=match["mnemonic"],
                operands=operands,
                guard=guard or None,
                negated=match["not"] == "!",
            )
        )


def _statements(body: _Body, text: str, line: int) -> None:
    """Cut at semicolons and at braces that hold no operands."""
    buffer, start, inside = "", line, 0
    for piece in re.split(r"([;{}])", text):
        if piece == "{" and buffer.strip() and not _only_labels(buffer):
            inside += 1
        elif piece == "}" and inside:
            inside -= 1
        elif piece == "{":
            body.statement(buffer, start)
            body.open()
            buffer, start = "", line
            continue
        elif piece in (";", "}") and not inside:
            if piece == "}" and buffer.strip() and not _only_labels(buffer):
                raise _error("a statement without an end", start, buffer)
            body.statement(buffer, start)
            buffer, start = "", line
            if piece == "}" and body.close():
                return
            continue
        buffer += piece
        line += piece.count("\n")
    raise _error("the entry has no closing brace", line)


def _only_labels(text: str) -> bool:
    while match := _LABEL.match(text):
        text = text[match.end() :]
    return not text.strip()


def parse(text: str, entry: str | None = None) -> Entry:
    """The kernel called ``entry``, or the only one there is.

    Raises:
        PtxError: SYNTAX, naming the line.
    """
    text = _clean(text)
    entries = {match["name"]: match for match in _BEGIN.finditer(text)}
    if entry is None and len(entries) == 1:
        entry = next(iter(entries))
    if entry not in entries:
        raise PtxError(Reason.SYNTAX, f"entry {entry!r} wanted, there are {sorted(entries)}")
    match = entries[entry]
    body = _Body(text[: min(m.start() for m in entries.values())])
    line = text[: match.end()].count("\n") + 1
    parameters = _parameters(match["parameters"], line)
    _statements(body, text[match.end() :], line)
    block = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*1)*\s*(?=[.\s]|$)", match["directives"])
    return Entry(
        name=entry,
        parameters=parameters,
        registers=body.registers,
        shared=body.shared,
        static_shared=body.static,
        instructions=tuple(body.instructions),
        labels=body.labels,
        tables=body.tables,
        block=int(block[1]) if block else None,
    )


def registers_in(operand: Operand) -> tuple[str, ...]:
    """Registers that stand in an operand."""
    if isinstance(operand, Register):
        return (operand.name,)
    if isinstance(operand, Vector):
        return tuple(name for item in operand.items for name in registers_in(item))
    if isinstance(operand, Pair):
        return registers_in(operand.first) + registers_in(operand.second)
    if isinstance(operand, Address) and isinstance(operand.base, Register):
        return (operand.base.name,)
    return ()
