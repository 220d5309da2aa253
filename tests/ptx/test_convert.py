"""Conversions against Python's integers and fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ptx import types
from tests.ptx.rationals import FORMATS
from tests.ptx.snippets import apply
from tests.ptx.test_floats import NAN, codes, columns, raw

INTEGERS = [f"{kind}{width}" for width in (8, 16, 32, 64) for kind in "us"]


def limits(kind: str) -> tuple[int, int]:
    width = types.bits(kind)
    return (-(1 << (width - 1)), (1 << (width - 1)) - 1) if kind[0] == "s" else (0, (1 << width) - 1)


def integers(kind: str) -> st.SearchStrategy[int]:
    low, high = limits(kind)
    return st.integers(low, high) | st.sampled_from([low, high, 0, 1, high // 2, high - 1])


@pytest.mark.parametrize("source", INTEGERS)
@settings(max_examples=4)
@given(data=st.data())
def test_integers_wrap_or_clamp(source: str, data: st.DataObject) -> None:
    values = data.draw(st.lists(integers(source), min_size=1, max_size=32))
    column = (source, np.array(values, types.dtype(source)))
    for target in INTEGERS:
        low, high = limits(target)
        wrapped = apply(f"cvt.{target}.{source}", target, column)
        assert [int(v) for v in wrapped] == [(v - low) % (high - low + 1) + low for v in values], (
            target,
            source,
        )
        clamped = apply(f"cvt.sat.{target}.{source}", target, column)
        assert [int(v) for v in clamped] == [min(max(v, low), high) for v in values], (target, source)


@pytest.mark.parametrize("source", INTEGERS)
@settings(max_examples=6)
@given(data=st.data())
def test_integers_to_floats_round_once(source: str, data: st.DataObject) -> None:
    values = data.draw(st.lists(integers(source), min_size=1, max_size=32))
    got = raw(apply(f"cvt.rn.f32.{source}", "f32", (source, np.array(values, types.dtype(source)))))
    assert got == [FORMATS["f32"].round(Fraction(value)) for value in values]


_ROUND = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def near_limits() -> st.SearchStrategy[int]:
    """fp32 codes around the powers of two where integers end, and halves."""
    form = FORMATS["f32"]
    powers = st.builds(lambda e, d: form.round(Fraction(2) ** e) + d, st.integers(-2, 65), st.integers(-2, 2))
    halves = st.builds(lambda n: form.round(Fraction(n, 2)), st.integers(0, 600))
    return st.builds(lambda code, sign: code | (sign << 31), powers | halves, st.integers(0, 1)) | codes(
        "f32"
    )


def near_bf16s_end() -> st.SearchStrategy[int]:
    """fp32 codes from bf16's largest number on."""
    return st.builds(
        lambda low, sign: 0x7F7F0000 + low | sign << 31, st.integers(0, 0x10000), st.integers(0, 1)
    )


@pytest.mark.parametrize("target", INTEGERS)
@pytest.mark.parametrize("mode", sorted(_ROUND))
@settings(max_examples=5)
@given(data=st.data())
def test_floats_to_integers_clamp(mode: str, target: str, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.tuples(near_limits()), min_size=1, max_size=48))
    form, (low, high) = FORMATS["f32"], limits(target)
    got = apply(f"cvt.{mode}.{target}.f32", target, *columns("f32", rows))
    for (code,), value in zip(rows, got.tolist(), strict=True):
        if form.is_nan(code):
            want = 0 if types.bits(target) < 64 else -(1 << 63) if target[0] == "s" else 1 << 63
        elif form.is_infinite(code):
            want = low if code & form.sign else high
        else:
            want = min(max(_ROUND[mode](form.value(code)), low), high)
        assert value == want, (mode, target, hex(code))


@pytest.mark.parametrize("mode", sorted(_ROUND))
@settings(max_examples=8)
@given(rows=st.lists(st.tuples(near_limits()), min_size=1, max_size=48))
def test_rounding_to_integral_keeps_the_sign_of_zero(mode: str, rows: list[tuple[int, ...]]) -> None:
    form = FORMATS["f32"]
    got = raw(apply(f"cvt.{mode}.f32.f32", "f32", *columns("f32", rows)))
    for (code,), value in zip(rows, got, strict=True):
        if form.is_nan(code):
            assert value == NAN["f32"]
        elif not form.is_infinite(code):
            want = form.round(Fraction(_ROUND[mode](form.value(code))), negative_zero=bool(code & form.sign))
            assert value == want, (mode, hex(code))


@pytest.mark.parametrize("target", ["f16", "bf16"])
@settings(max_examples=15)
@given(rows=st.lists(st.tuples(codes("f32")), min_size=1, max_size=64))
def test_narrowing_rounds_once(target: str, rows: list[tuple[int, ...]]) -> None:
    form, small = FORMATS["f32"], FORMATS[target]
    got = raw(apply(f"cvt.rn.{target}.f32", target, *columns("f32", rows)))
    both = raw(
        apply(
            f"cvt.rn.{target}x2.f32",
            f"{target}x2",
            *columns("f32", [(b, a) for (a,), (b,) in zip(rows, rows[::-1], strict=True)]),
        )
    )
    for i, (code,) in enumerate(rows):
        if form.is_nan(code):
            want = NAN[target]
        elif form.is_infinite(code):
            want = small.infinity | (small.sign if code & form.sign else 0)
        else:
            want = small.round(form.value(code), negative_zero=bool(code & form.sign))
        assert got[i] == want == both[2 * i], (target, hex(code))
        assert both[2 * i + 1] == got[len(rows) - 1 - i]


@settings(max_examples=15)
@given(rows=st.lists(st.tuples(codes("f32"), near_bf16s_end()), min_size=1, max_size=64))
def test_narrowing_to_bf16_saturates(rows: list[tuple[int, ...]]) -> None:
    form, small = FORMATS["f32"], FORMATS["bf16"]

    def want(code: int) -> int:
        if form.is_nan(code):
            return NAN["bf16"]
        if form.is_infinite(code):
            return small.largest | (small.sign if code & form.sign else 0)
        return small.round(form.value(code), negative_zero=bool(code & form.sign), saturate=True)

    got = raw(apply("cvt.rn.satfinite.bf16x2.f32", "bf16x2", *columns("f32", rows)))
    assert got == [want(code) for a, b in rows for code in (b, a)]  # the first operand goes to the upper half


@pytest.mark.parametrize("target", ["f16", "bf16"])
def test_widening_is_exact(target: str) -> None:
    small, form = FORMATS[target], FORMATS["f32"]
    some = np.concatenate([np.arange(0, 1 << 16, 97), [small.infinity, small.sign | small.infinity]]).astype(
        np.uint16
    )
    got = raw(apply(f"cvt.f32.{target}", "f32", (target, some)))
    for code, value in zip(some.tolist(), got, strict=True):
        if small.is_nan(code):
            assert value == NAN["f32"]
        elif small.is_infinite(code):
            assert value == form.infinity | (form.sign if code & small.sign else 0)
        else:
            assert value == form.round(small.value(code), negative_zero=bool(code & small.sign))


def fp8_codes(name: str) -> st.SearchStrategy[int]:
    """fp32 codes in and around the range of an 8-bit format, ties included."""
    small, form = FORMATS[name], FORMATS["f32"]

    def between(code: int, part: int, sign: int) -> int:
        low, high = small.value(code), small.value(min(code + 1, small.largest))
        return form.round(low + (high - low) * part / 4) | sign << 31

    return st.builds(between, st.integers(0, small.largest), st.integers(0, 4), st.integers(0, 1)) | codes(
        "f32"
    )


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
@settings(max_examples=25)
@given(data=st.data())
def test_fp8_is_the_nearest_and_saturates(name: str, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.tuples(fp8_codes(name), fp8_codes(name)), min_size=1, max_size=64))
    form, small = FORMATS["f32"], FORMATS[name]

    def want(code: int) -> int:
        if form.is_nan(code):
            return 0x7F
        if form.is_infinite(code):
            return small.largest | (code >> 24 & 0x80)
        return small.round(form.value(code), negative_zero=bool(code & form.sign), saturate=True)

    got = apply(f"cvt.rn.satfinite.{name}x2.f32", f"{name}x2", *columns("f32", rows))
    assert got.tolist() == [[want(b), want(a)] for a, b in rows]  # the first operand goes to the upper half


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_fp8_is_read_exactly(name: str) -> None:
    small, half = FORMATS[name], FORMATS["f16"]
    every = np.arange(256, dtype=np.uint16)
    got = raw(apply(f"cvt.rn.f16x2.{name}x2", "f16x2", (f"{name}x2", every | every[::-1] << 8)))
    for code, value in zip(every.tolist(), got[::2], strict=True):
        if small.is_nan(code):
            assert value == NAN["f16"]
        elif small.is_infinite(code):
            assert value == half.infinity | (half.sign if code & 0x80 else 0)
        else:
            assert value == half.round(small.value(code), negative_zero=bool(code & 0x80))


def test_pack_saturates() -> None:
    a, b, c = (
        np.array([300, -5], np.int32),
        np.array([-300, 77], np.int32),
        np.array([0x11223344] * 2, np.uint32),
    )
    got = apply("cvt.pack.sat.s8.s32.b32", "b32", ("s32", a), ("s32", b), ("b32", c))
    assert [hex(v) for v in got.tolist()] == ["0x33447f80", "0x3344fb4d"]
