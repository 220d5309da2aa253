"""Floating point against fractions: one rounding, half to even, subnormals kept, NaN canonical."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ptx import types
from tests.ptx.rationals import FORMATS, Format
from tests.ptx.snippets import apply

NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}


def codes(kind: str) -> st.SearchStrategy[int]:
    """Any bits; the ends of the format; small integers and their neighbours, where sums are ties."""
    form = FORMATS[kind]
    every = 2 * form.sign - 1
    one = form.bias << form.mantissa
    edges = [
        0,
        1,
        2,
        form.largest,
        form.infinity,
        form.infinity + 1,
        1 << form.mantissa,
        (1 << form.mantissa) - 1,
        one,
    ]
    near = st.integers(one - (3 << form.mantissa), one + (3 << form.mantissa))
    magnitude = st.integers(0, every) | st.sampled_from(edges) | near
    return st.builds(lambda code, sign: code ^ (form.sign if sign else 0), magnitude, st.booleans())


def exact(kind: str, name: str, row: tuple[int, ...]) -> int | None:
    """The result's code, None where an operand is not finite or the exact result no fraction."""
    form = FORMATS[kind]
    if any(form.is_nan(code) or form.is_infinite(code) for code in row):
        return None
    values = [form.value(code) for code in row]
    signs = [bool(code & form.sign) for code in row]
    a, b = values[0], values[1] if len(values) > 1 else Fraction(1)
    if name == "sqrt":
        return row[0] if a == 0 else None
    if name == "div":
        return None if b == 0 else form.round(a / b, negative_zero=signs[0] != signs[1])
    if name == "mul":
        return form.round(a * b, negative_zero=signs[0] != signs[1])
    if name == "fma":
        product = signs[0] != signs[1]
        return form.round(a * b + values[2], negative_zero=product and signs[2] and a * b == 0)
    sign = signs[1] if name == "add" else not signs[1]
    total = a + b if name == "add" else a - b
    return form.round(total, negative_zero=signs[0] and sign and a == 0)


_COUNTS = {"add": 2, "sub": 2, "mul": 2, "fma": 3, "div": 2}


def columns(kind: str, rows: list[tuple[int, ...]]) -> list[tuple[str, Any]]:
    return [(kind, np.array(column, f"u{types.bits(kind) // 8}")) for column in zip(*rows, strict=True)]


def raw(values: Any) -> list[int]:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").reshape(-1).tolist()


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", sorted(_COUNTS))
@settings(max_examples=12)
@given(data=st.data())
def test_it_is_rounded_once(name: str, kind: str, data: st.DataObject) -> None:
    if name == "div" and kind != "f32":
        return
    row = st.tuples(*[codes(kind)] * _COUNTS[name])
    rows = data.draw(st.lists(row, min_size=1, max_size=48))
    got = raw(apply(f"{name}.rn.{kind}", kind, *columns(kind, rows)))
    for inputs, value in zip(rows, got, strict=True):
        want = exact(kind, name, inputs)
        if want is not None:
            assert value == want, (name, kind, [hex(x) for x in inputs], hex(want), hex(value))
        elif any(FORMATS[kind].is_nan(code) for code in inputs):
            assert value == NAN[kind]


def test_a_second_rounding_would_be_noticed() -> None:
    """fp32's product and sum rounded apart, and bf16 cut off, differ from what is wanted: the laws can fail."""
    form = FORMATS["f32"]
    a, c = (
        form.round(Fraction(4097, 4096)),
        form.round(Fraction(-4097 * 4097, 4096 * 4096) + Fraction(1, 1 << 24)),
    )
    apart = form.round(form.value(form.round(form.value(a) ** 2)) + form.value(c))
    together = exact("f32", "fma", (a, a, c))
    assert apart != together
    assert raw(apply("fma.rn.f32", "f32", *columns("f32", [(a, a, c)]))) == [together]
    third = 0x3EAAAAAB
    assert raw(apply("cvt.rn.bf16.f32", "bf16", *columns("f32", [(third,)]))) == [0x3EAB] != [third >> 16]


@settings(max_examples=10)
@given(rows=st.lists(st.tuples(codes("f32")), min_size=1, max_size=48))
def test_sqrt_is_the_nearest(rows: list[tuple[int, ...]]) -> None:
    form = FORMATS["f32"]
    got = raw(apply("sqrt.rn.f32", "f32", *columns("f32", rows)))
    for (code,), value in zip(rows, got, strict=True):
        if form.is_nan(code) or (code & form.sign and code != form.sign):
            assert value == NAN["f32"]
        elif not form.is_infinite(code) and form.value(code) > 0:
            below, above = (
                (form.value(value - 1) + form.value(value)) / 2,
                (form.value(value) + form.value(value + 1)) / 2,
            )
            assert below**2 <= form.value(code) <= above**2


@pytest.mark.parametrize("name", ["min", "max", "min.NaN", "max.NaN"])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@settings(max_examples=10)
@given(data=st.data())
def test_extremes_know_nan_and_signs_of_zero(name: str, kind: str, data: st.DataObject) -> None:
    form = FORMATS[kind]
    rows = data.draw(st.lists(st.tuples(codes(kind), codes(kind)), min_size=1, max_size=48))
    got = raw(apply(f"{name}.{kind}", kind, *columns(kind, rows)))

    def key(code: int) -> int:
        """Orders codes as numbers, -0 below +0."""
        return -(code & (form.sign - 1)) - 1 if code & form.sign else code

    for (a, b), value in zip(rows, got, strict=True):
        numbers = [code for code in (a, b) if not form.is_nan(code)]
        if not numbers or (name.endswith("NaN") and len(numbers) < 2):
            assert value == NAN[kind]
        else:
            assert value == (min if name.startswith("min") else max)(numbers, key=key)


def _ordered(name: str, a: int, b: int) -> bool:
    """IEEE 754's comparisons; with ``u`` also true where one is NaN."""
    form = FORMATS["f32"]
    if form.is_nan(a) or form.is_nan(b):
        return name == "nan" or (name != "num" and name.endswith("u") and len(name) == 3)
    x, y = (float(np.uint32(code).view(np.float32)) for code in (a, b))
    laws = {
        "eq": x == y,
        "ne": x != y,
        "lt": x < y,
        "le": x <= y,
        "gt": x > y,
        "ge": x >= y,
        "num": True,
        "nan": False,
    }
    return laws[name if name in laws else name[:2]]


@pytest.mark.parametrize(
    "name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_comparisons_know_nan(name: str) -> None:
    edges = [0, 0x80000000, 1, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF]
    rows = [(a, b) for a in edges for b in edges]
    got = apply(f"setp.{name}.f32", "pred", *columns("f32", rows)).tolist()
    assert got == [_ordered(name, a, b) for a, b in rows]


def test_pairs_are_two_of_each() -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal((64, 2)).astype(np.float32) for _ in range(2))
    wide = [("f32x2", x.view(np.uint64)[:, 0]) for x in (a, b)]
    for name, want in (("add", a + b), ("mul", a * b), ("sub", a - b)):
        assert apply(f"{name}.rn.f32x2", "f32x2", *wide).tobytes() == want.tobytes()


def test_signs() -> None:
    values = [0, 1, 0x3F800000, 0x80000000, 0xFF800000, 0x7FC00123]
    assert raw(apply("abs.f32", "f32", *columns("f32", [(v,) for v in values])))[:5] == [
        v & 0x7FFFFFFF for v in values[:5]
    ]
    assert raw(apply("neg.f32", "f32", *columns("f32", [(v,) for v in values])))[:5] == [
        v ^ 0x80000000 for v in values[:5]
    ]
    assert raw(apply("abs.f32", "f32", *columns("f32", [(values[-1],)]))) == [
        NAN["f32"]
    ]  # payloads do not survive
    assert math.isnan(float(np.uint32(NAN["f32"]).view(np.float32)))


def test_an_overflow_is_infinite_and_zero_by_zero_is_nan() -> None:
    big = FORMATS["f32"].largest
    assert raw(apply("add.rn.f32", "f32", *columns("f32", [(big, big)]))) == [0x7F800000]
    assert raw(apply("div.rn.f32", "f32", *columns("f32", [(0, 0), (0x3F800000, 0x80000000)]))) == [
        NAN["f32"],
        0xFF800000,
    ]


def _formats() -> list[tuple[str, Format]]:
    return sorted(FORMATS.items())


@pytest.mark.parametrize(("name", "form"), _formats(), ids=[name for name, _ in _formats()])
def test_the_statement_rounds_each_value_to_itself(name: str, form: Format) -> None:
    rng = np.random.default_rng(len(name))
    for code in [0, 1, form.largest, *rng.integers(0, form.largest, 20).tolist()]:
        assert form.round(form.value(code)) == code
        between = (form.value(code) + form.value(code + 1)) / 2 if code < form.largest else form.value(code)
        assert form.round(between) == code + (code < form.largest and code & 1)
