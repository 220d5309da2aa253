"""Integer and bit instructions against Python's integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ptx import types
from tests.ptx.snippets import apply

Law = Callable[..., int]


def _signed(value: int, width: int) -> int:
    value &= (1 << width) - 1
    return value - (1 << width) if value >> (width - 1) else value


def _truncated(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return -quotient if (a < 0) != (b < 0) else quotient


def _laws(t: str) -> dict[str, tuple[str, tuple[str, ...], Law]]:
    """Spelling -> result type, source types, what Python says it is."""
    width, word = types.bits(t), "b32"
    high = 0 if t[0] == "u" else 1

    def shift_right(a: int, n: int) -> int:
        return a >> min(n, width + 1)

    def extract(a: int, b: int, c: int) -> int:
        position, length = b & 255, c & 255
        bits = [
            a >> min(position + i, width - 1) & 1 if position + i < width else None for i in range(length)
        ]
        top = min(position + length - 1, width - 1)
        fill = 0 if not high or length == 0 else a >> top & 1
        found = [fill if bit is None else bit for bit in bits[:width]] + [fill] * (width - length)
        return sum(bit << i for i, bit in enumerate(found[:width]))

    laws: dict[str, tuple[str, tuple[str, ...], Law]] = {
        f"add.{t}": (t, (t, t), lambda a, b: a + b),
        f"sub.{t}": (t, (t, t), lambda a, b: a - b),
        f"mul.lo.{t}": (t, (t, t), lambda a, b: a * b),
        f"mul.hi.{t}": (t, (t, t), lambda a, b: a * b >> width),
        f"mad.lo.{t}": (t, (t, t, t), lambda a, b, c: a * b + c),
        f"min.{t}": (t, (t, t), min),
        f"max.{t}": (t, (t, t), max),
        f"div.{t}": (t, (t, t), _truncated),
        f"rem.{t}": (t, (t, t), lambda a, b: a - b * _truncated(a, b)),
        f"shr.{t}": (t, (t, word), shift_right),
    }
    if width < 64:
        wide = f"{t[0]}{2 * width}"
        laws[f"mul.wide.{t}"] = (wide, (t, t), lambda a, b: a * b)
        laws[f"mad.wide.{t}"] = (wide, (t, t, wide), lambda a, b, c: a * b + c)
    if width > 16:
        laws[f"bfe.{t}"] = (t, (t, word, word), extract)
        laws[f"bfind.{t}"] = (word, (t,), lambda a: (a if a >= 0 else ~a).bit_length() - 1)
    if high:
        laws |= {f"abs.{t}": (t, (t,), abs), f"neg.{t}": (t, (t,), lambda a: -a)}
    return laws


def _bit_laws(width: int) -> dict[str, tuple[str, tuple[str, ...], Law]]:
    t, ones = f"b{width}", (1 << width) - 1

    def insert(a: int, b: int, c: int, d: int) -> int:
        for i in range(d & 255):
            place = (c & 255) + i
            if place < width and i < width:
                b = b & ~(1 << place) | (a >> i & 1) << place
        return b

    laws: dict[str, tuple[str, tuple[str, ...], Law]] = {
        f"and.{t}": (t, (t, t), lambda a, b: a & b),
        f"or.{t}": (t, (t, t), lambda a, b: a | b),
        f"xor.{t}": (t, (t, t), lambda a, b: a ^ b),
        f"not.{t}": (t, (t,), lambda a: ~a),
        f"cnot.{t}": (t, (t,), lambda a: int(a == 0)),
        f"shl.{t}": (t, (t, "b32"), lambda a, n: a << n if n < width else 0),
        f"selp.{t}": (t, (t, t, "pred"), lambda a, b, p: a if p else b),
    }
    if width > 16:
        laws |= {
            f"popc.{t}": ("b32", (t,), lambda a: a.bit_count()),
            f"clz.{t}": ("b32", (t,), lambda a: width - a.bit_length()),
            f"brev.{t}": (t, (t,), lambda a: int(f"{a & ones:0{width}b}"[::-1], 2)),
            f"bfi.{t}": (t, (t, t, "b32", "b32"), insert),
        }
    return laws


def _permute(a: int, b: int, c: int) -> int:
    pool = (a | b << 32).to_bytes(8, "little")
    chosen = []
    for i in range(4):
        byte, negative = pool[c >> 4 * i & 7], c >> 4 * i & 8
        chosen.append((0xFF if byte & 0x80 else 0) if negative else byte)
    return int.from_bytes(bytes(chosen), "little")


_WORDS: dict[str, tuple[str, tuple[str, ...], Law]] = {
    "prmt.b32": ("b32", ("b32", "b32", "b32"), _permute),
    "prmt.b32.f4e": ("b32", ("b32",) * 3, lambda a, b, c: (a | b << 32 | (a | b << 32) << 64) >> 8 * (c & 3)),
    "prmt.b32.rc16": ("b32", ("b32",) * 3, lambda a, _, c: (a >> 16 * (c & 1) & 0xFFFF) * 0x10001),
    "shf.l.wrap.b32": ("b32", ("b32",) * 3, lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
    "shf.r.wrap.b32": ("b32", ("b32",) * 3, lambda a, b, c: (b << 32 | a) >> (c & 31)),
    "shf.l.clamp.b32": ("b32", ("b32",) * 3, lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32),
    "shf.r.clamp.b32": ("b32", ("b32",) * 3, lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    "dp4a.s32.u32": (
        "b32",
        ("b32",) * 3,
        lambda a, b, c: sum(_signed(a >> 8 * i, 8) * (b >> 8 * i & 255) for i in range(4)) + c,
    ),
}
LAWS = dict(_WORDS)
for _width in (16, 32, 64):
    LAWS |= _laws(f"u{_width}") | _laws(f"s{_width}") | _bit_laws(_width)


def _operand(kind: str, mnemonic: str, place: int) -> st.SearchStrategy[int]:
    width = 1 if kind == "pred" else types.bits(kind)
    if kind == "b32" and place and mnemonic[:3] in ("shl", "shr", "bfe", "bfi", "shf"):
        return st.integers(0, 70) | st.sampled_from([255, 256, 1 << 31, (1 << 32) - 1])
    edges = st.sampled_from([0, 1, (1 << width) - 1, 1 << (width - 1), (1 << (width - 1)) - 1])
    values = st.integers(0, (1 << width) - 1) | edges | st.integers(0, min(9, (1 << width) - 1))
    return values.filter(bool) if place == 1 and mnemonic[:3] in ("div", "rem") else values


def _check(mnemonic: str, rows: list[tuple[int, ...]]) -> None:
    result, kinds, law = LAWS[mnemonic]
    columns = []
    for kind, raw in zip(kinds, zip(*rows, strict=True), strict=True):
        width = 32 if kind == "pred" else types.bits(kind)
        columns.append((kind, np.array(raw, np.uint64).astype(f"u{width // 8}")))
    got = apply(mnemonic, result, *columns)
    width = types.bits(result)
    for row, value in zip(rows, got, strict=True):
        read = [_signed(x, types.bits(k)) if k[0] == "s" else x for x, k in zip(row, kinds, strict=True)]
        want = law(*read) & ((1 << width) - 1)
        assert int(value) & ((1 << width) - 1) == want, (mnemonic, [hex(x) for x in row], hex(want))


@pytest.mark.parametrize("mnemonic", sorted(LAWS))
@settings(max_examples=8)
@given(data=st.data())
def test_it_is_what_python_says(mnemonic: str, data: st.DataObject) -> None:
    row = st.tuples(*(_operand(kind, mnemonic, i) for i, kind in enumerate(LAWS[mnemonic][1])))
    _check(mnemonic, data.draw(st.lists(row, min_size=1, max_size=64)))


def test_a_wrong_law_is_noticed() -> None:
    """The comparison itself: shifts that wrap as x86's do, and floor division, differ from PTX's."""
    shifted = apply("shl.b32", "b32", ("b32", np.array([1], np.uint32)), ("b32", np.array([33], np.uint32)))
    assert int(shifted[0]) == 0 != 1 << (33 & 31)
    seven, two = np.array([-7], np.int32), np.array([2], np.int32)
    assert int(apply("div.s32", "s32", ("s32", seven), ("s32", two))[0]) == -3 != -7 // 2
    assert int(apply("rem.s32", "s32", ("s32", seven), ("s32", two))[0]) == -1 != -7 % 2


@pytest.mark.parametrize("table", [0x00, 0x80, 0x96, 0xE8, 0xCA, 0xFE, 0x3C])
def test_lop3_is_its_table(table: int) -> None:
    rng = np.random.default_rng(table)
    a, b, c = (rng.integers(0, 1 << 32, 40, dtype=np.uint32) for _ in range(3))
    got = apply("lop3.b32", "b32", ("b32", a), ("b32", b), ("b32", c), tail=f", {table}")
    for x, y, z, value in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        rows = [(x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1) for i in range(32)]
        assert value == sum((table >> row & 1) << i for i, row in enumerate(rows))


_ORDERS: dict[str, Any] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("name", sorted(_ORDERS))
@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_setp_compares(name: str, kind: str) -> None:
    width = types.bits(kind)
    edges = np.array([0, 1, (1 << width) - 1, 1 << (width - 1), (1 << (width - 1)) - 1], np.uint64).astype(
        f"u{width // 8}"
    )
    a, b = (x.reshape(-1) for x in np.meshgrid(edges, edges))
    third = np.arange(a.size) % 2
    read = [[_signed(int(v), width) if kind[0] == "s" else int(v) for v in x] for x in (a, b)]
    want = [_ORDERS[name](x, y) for x, y in zip(*read, strict=True)]
    assert apply(f"setp.{name}.{kind}", "pred", (kind, a), (kind, b)).tolist() == want
    joined = apply(f"setp.{name}.xor.{kind}", "pred", (kind, a), (kind, b), ("pred", third))
    assert joined.tolist() == [bool(w) != bool(t) for w, t in zip(want, third, strict=True)]
