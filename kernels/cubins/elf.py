"""What a cubin says about its kernel: an ELF file whose ``.nv.info`` sections are lists of attributes.

Attributes are ``u8 format, u8 attribute, u16 value``; with format 4 the value is the length of what follows. Names
and layouts are those that ``cuobjdump -elf`` prints.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from hybridcomm.kernels.cubins.errors import ArtefactError

__all__ = ["Cubin", "read"]

_SIZED = 4  # EIFMT_SVAL
_REGCOUNT = 0x2F  # EIATTR_*: u32 symbol, u32 registers
_FRAME_SIZE = 0x11  # u32 symbol, u32 bytes
_KPARAM_INFO = 0x17  # u32 index, u16 ordinal, u16 offset, u32 whose bits from 18 on are the size
_REQNTID = 0x10  # u32 x, y, z
_MAX_THREADS = 0x05


@dataclass(frozen=True, kw_only=True)
class Cubin:
    """``registers`` per thread; ``frame``: bytes of stack per thread; ``shared``: static bytes per block.

    ``parameters``: (offset, size) in bytes, in order; ``threads``: the block that the kernel was compiled for, if told.
    """

    symbol: str
    registers: int
    frame: int
    shared: int
    parameters: tuple[tuple[int, int], ...]
    threads: int | None


def _sections(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Name -> (size, content); sections that take no room in the file have no content."""
    if data[:4] != b"\x7fELF":
        raise ArtefactError("no cubin: it does not begin as an ELF file does")
    (table,) = struct.unpack_from("<Q", data, 40)
    width, count, names = struct.unpack_from("<HHH", data, 58)
    rows = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * width) for i in range(count)]
    found = {}
    for name, kind, _, _, offset, size, *_ in rows:
        begin = rows[names][4] + name
        text = data[begin : data.index(b"\0", begin)].decode()
        found[text] = (size, b"" if kind == 8 else data[offset : offset + size])
    return found


def _attributes(content: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(content):
        form, attribute, value = struct.unpack_from("<BBH", content, at)
        at += 4
        if form == _SIZED:
            yield attribute, content[at : at + value]
            at += value


def read(data: bytes) -> Cubin:
    """The one kernel of a cubin.

    Raises:
        ArtefactError: not a cubin, or not of exactly one kernel.
    """
    sections = _sections(data)
    symbols = [name.removeprefix(".text.") for name in sections if name.startswith(".text.")]
    if len(symbols) != 1:
        raise ArtefactError(f"a cubin of one kernel wanted, got {len(symbols)}: {', '.join(symbols)}")
    (symbol,) = symbols
    common = dict(_attributes(sections[".nv.info"][1]))
    parameters: dict[int, tuple[int, int]] = {}
    threads = None
    for attribute, value in _attributes(sections[f".nv.info.{symbol}"][1]):
        if attribute == _KPARAM_INFO:
            _, ordinal, offset, size = struct.unpack("<IHHI", value)
            parameters[ordinal] = (offset, size >> 18)
        elif attribute in (_REQNTID, _MAX_THREADS):
            x, y, z = struct.unpack("<III", value)
            threads = x * y * z
    return Cubin(
        symbol=symbol,
        registers=struct.unpack("<II", common[_REGCOUNT])[1],
        frame=struct.unpack("<II", common[_FRAME_SIZE])[1],
        shared=sections.get(f".nv.shared.{symbol}", (0, b""))[0],
        parameters=tuple(parameters[ordinal] for ordinal in sorted(parameters)),
        threads=threads,
    )
