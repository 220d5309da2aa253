"""What a PTX text says about its kernel, and how it is made to fit older drivers.

A driver refuses PTX of a newer ISA than its own, and the ``a`` of a target such as ``sm_90a`` forbids all other
architectures. Neither is needed here. So both are lowered in the text, and ptxas, which knows what each version and
target may use, refuses the result if one of them was needed after all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hybridcomm.kernels.cubins.errors import BuildError

__all__ = ["ISA", "OLDEST_CUDA", "Ptx", "lower", "only", "read", "stripped"]

ISA = {80: "8.0", 90: "8.0", 100: "8.6"}
"""Architecture -> the oldest PTX ISA that we ask of it: 8.0 is CUDA 12.0's; sm_100 came with 8.6."""
OLDEST_CUDA = "12.0"
"""Every CUDA 12 driver takes ISA 8.0 (PTX ISA, release notes), and so PTX for sm_80, which is the one shipped."""

_NBYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True, kw_only=True)
class Ptx:
    """``parameters``: bytes of each, in order."""

    version: str
    target: str
    symbol: str
    parameters: tuple[int, ...]


def stripped(text: str) -> str:
    """Without comments: they name what the compiler was, not what the code is."""
    text = re.sub(r"[ \t]*//[^\n]*", "", text)
    return re.sub(r"\n{2,}", "\n", text).strip() + "\n"


def lower(text: str, arch: int) -> str:
    """The same code for the plain target and the oldest ISA of ``arch``."""
    text = re.sub(r"^\.version \d+\.\d+", f".version {ISA[arch]}", text, count=1, flags=re.MULTILINE)
    return re.sub(r"^\.target sm_\d+a?\b", f".target sm_{arch}", text, count=1, flags=re.MULTILINE)


def only(text: str, symbol: str) -> str:
    """The text without all kernels but ``symbol``, and without the variables that it does not name.

    Raises:
        BuildError: no such kernel.
    """
    head, *entries = re.split(r"^(?=\.visible \.entry )", text, flags=re.MULTILINE)
    chosen = [entry for entry in entries if re.match(rf"\.visible \.entry {re.escape(symbol)}\s*\(", entry)]
    if len(chosen) != 1:
        raise BuildError(f"no kernel {symbol} in the PTX")
    body = chosen[0][: chosen[0].index("\n}") + 2]
    kept = [
        line
        for line in head.splitlines()
        if (name := re.search(r"([\w$]+)(?:\[[^=]*)?(?: = .*)?;$", line)) is None or name[1] in body
    ]
    return "\n".join([*kept, body]) + "\n"


def read(text: str) -> Ptx:
    """The one kernel of a PTX text.

    Raises:
        BuildError: not of exactly one kernel, or a parameter that is no plain number or pointer.
    """
    entries = re.findall(r"^\s*\.(?:visible|weak)?\s*\.entry\s+([\w$]+)\s*\(([^)]*)\)", text, re.MULTILINE)
    version = re.search(r"^\.version (\d+\.\d+)", text, re.MULTILINE)
    target = re.search(r"^\.target (\w+)", text, re.MULTILINE)
    if len(entries) != 1 or version is None or target is None:
        raise BuildError(f"PTX of one kernel wanted, got {len(entries)}")
    symbol, declared = entries[0]
    parameters = []
    for line in filter(None, (part.strip() for part in declared.split(","))):
        told = re.match(r"\.param\s+\.[usbf](8|16|32|64)\b(?!.*\[)", line)
        if told is None:
            raise BuildError(f"{symbol}: a number or a pointer wanted, got {line}")
        parameters.append(_NBYTES[told[1]])
    return Ptx(version=version[1], target=target[1], symbol=symbol, parameters=tuple(parameters))
