"""Operands of PTX instructions, as data."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Address", "Immediate", "Operand", "Pair", "Register", "Sink", "Special", "Symbol", "Vector"]

_SPECIAL = re.compile(
    r"%(?:(?:tid|ntid|ctaid|nctaid)\.[xyz]|laneid|warpid|nwarpid|lanemask_(?:eq|lt|le|gt|ge))"
)
_INTEGER = re.compile(r"-?(?:0x[0-9a-fA-F]+|0b[01]+|\d+)U?")
_FLOAT = re.compile(r"0f([0-9a-fA-F]{8})|0d([0-9a-fA-F]{16})")
_ADDRESS = re.compile(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]")


@dataclass(frozen=True)
class Register:
    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """``value``: an integer, or the bits of a float with ``float_bits`` 32 or 64."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Sink:
    """``_``: a result that nobody wants."""


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """``first|second``: two results."""

    first: Operand
    second: Operand


Operand = Register | Immediate | Special | Symbol | Sink | Address | Vector | Pair


def split(text: str) -> list[str]:
    """Cut at the commas that are in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"operand {text!r} is not understood")
    text = text.rstrip("U")
    digits = text.lstrip("-")
    octal = len(digits) > 1 and digits.isdigit() and digits[0] == "0"
    return int(text, 8) if octal else int(text, 0)


def parse_operand(text: str, name_of: Callable[[str], str | None]) -> Operand:
    """One operand; ``name_of`` gives the register that a name means here, or None.

    Raises:
        ValueError: it is none of those that PTX has.
    """
    if text.startswith("{"):
        return Vector(tuple(parse_operand(part, name_of) for part in split(text[1:-1])))
    if match := _ADDRESS.fullmatch(text):
        base = parse_operand(match[1], name_of)
        if not isinstance(base, (Register, Symbol, Immediate)):
            raise ValueError(f"{text!r} is no address")
        return Address(base, _integer(match[2] or "0"))
    if "|" in text:
        first, second = (parse_operand(part.strip(), name_of) for part in text.split("|"))
        return Pair(first, second)
    return _parse_simple(text, name_of)


def _parse_simple(text: str, name_of: Callable[[str], str | None]) -> Operand:
    if match := _FLOAT.fullmatch(text):
        return Immediate(int(match[1] or match[2], 16), 32 if match[1] else 64)
    negated = text.startswith("!")
    register = name_of(text.lstrip("!").strip())
    if register is not None:
        return Register(register, negated)
    if _SPECIAL.fullmatch(text):
        return Special(text)
    if re.fullmatch(r"[A-Za-z_$][\w$]*", text):
        return {"_": Sink(), "WARP_SZ": Immediate(32)}.get(text, Symbol(text))
    return Immediate(_integer(text))
