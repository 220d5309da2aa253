"""Warp instructions against loops over lanes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ptx import Memory
from tests.ptx.snippets import apply, run

WORDS = st.integers(0, (1 << 32) - 1)


def warp(values: list[int]) -> tuple[str, np.ndarray]:
    return "b32", np.array(values, np.uint32)


def _source(mode: str, lane: int, b: int, c: int) -> int:
    """The lane that is read, from the pseudocode of shfl.sync."""
    segment, clamp = c >> 8 & 31, c & 31
    low, high = lane & segment, (lane & segment) | (clamp & ~segment & 31)
    goal, inside = {
        "up": (lane - b, lane - b >= high),
        "down": (lane + b, lane + b <= high),
        "bfly": (lane ^ b, lane ^ b <= high),
        "idx": (low | (b & ~segment), (low | (b & ~segment)) <= high),
    }[mode]
    if mode == "bfly":
        inside = (lane ^ b) <= high
    return goal if inside else lane


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@settings(max_examples=12)
@given(values=st.lists(WORDS, min_size=64, max_size=64), b=st.integers(0, 31), log=st.integers(0, 5))
def test_shuffles(mode: str, values: list[int], b: int, log: int) -> None:
    width = 1 << log
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    got = apply(f"shfl.sync.{mode}.b32", "b32", warp(values), tail=f", {b}, {c}, -1")
    want = [values[i // 32 * 32 + _source(mode, i % 32, b, c)] for i in range(64)]
    assert got.tolist() == want


@settings(max_examples=12)
@given(values=st.lists(WORDS, min_size=64, max_size=64))
def test_reductions(values: list[int]) -> None:
    signed = [v - (1 << 32) if v >> 31 else v for v in values]
    laws = {
        "add.s32": (values, sum),
        "add.u32": (values, sum),
        "min.u32": (values, min),
        "max.u32": (values, max),
        "min.s32": (signed, min),
        "max.s32": (signed, max),
    }
    for name, (read, law) in laws.items():
        got = apply(f"redux.sync.{name}", "b32", warp(values), tail=", -1")
        assert got.tolist() == [law(read[i // 32 * 32 :][:32]) & 0xFFFFFFFF for i in range(64)], name
    joined = apply("redux.sync.or.b32", "b32", warp(values), tail=", -1")
    assert joined.tolist() == [
        int(np.bitwise_or.reduce(np.array(values[i // 32 * 32 :][:32]))) for i in range(64)
    ]


@settings(max_examples=12)
@given(values=st.lists(st.integers(0, 3), min_size=64, max_size=64))
def test_votes_and_matches(values: list[int]) -> None:
    flags = ("pred", np.array([v & 1 for v in values]))
    rows = [values[i // 32 * 32 :][:32] for i in range(64)]
    ballot = apply("vote.sync.ballot.b32", "b32", flags, tail=", -1")
    assert ballot.tolist() == [sum((v & 1) << i for i, v in enumerate(row)) for row in rows]
    assert apply("vote.sync.any.pred", "pred", flags, tail=", -1").tolist() == [
        any(v & 1 for v in row) for row in rows
    ]
    assert apply("vote.sync.all.pred", "pred", flags, tail=", -1").tolist() == [
        all(v & 1 for v in row) for row in rows
    ]
    same = apply("match.any.sync.b32", "b32", warp(values), tail=", -1")
    assert same.tolist() == [
        sum((v == values[i]) << j for j, v in enumerate(row)) for i, row in enumerate(rows)
    ]


def test_some_lanes_alone() -> None:
    """Half a warp with its own mask, in a branch; masks as they come from a register."""
    memory = Memory()
    out = memory.reserve(4 * 64)
    body = """
    setp.lt.u32 %p0, %t, 12;
    selp.b32 %r5, 0xfff, 0xfffff000, %p0;
    setp.gt.u32 %p1, %t, 31;
    @%p1 mov.u32 %r5, -1;
    @!%p0 bra L1;
    redux.sync.add.s32 %r1, %t, %r5;
    bra.uni L2;
L1: redux.sync.max.u32 %r1, %t, %r5;
L2: mad.wide.u32 %d0, %t, 4, %a0;
    st.global.u32 [%d0], %r1;
    """
    run(body, memory=memory, arguments=[out])
    assert memory.read(out, np.uint32).tolist() == [sum(range(12))] * 12 + [31] * 20 + [63] * 32


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_go_through_shared_memory(transposed: bool) -> None:
    """stmatrix writes what ldmatrix reads; ldmatrix hands lane i the columns 2 (i mod 4) and the next of row i / 4."""
    memory = Memory()
    out = memory.reserve(4 * 32 * 4)
    values = np.random.default_rng(1).integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    source = memory.place(values)
    word = ".trans" if transposed else ""
    body = f"""
    mov.u32 %r0, smem;
    mad.wide.u32 %d0, %t, 16, %a0;
    mad.lo.s32 %r1, %t, 16, %r0;
    ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%d0];
    st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4{word}.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r1];
    bar.sync 0;
    stmatrix.sync.aligned.m8n8.x4{word}.shared.b16 [%r1+512], {{%r2, %r3, %r4, %r5}};
    bar.sync 0;
    mad.wide.u32 %d1, %t, 16, %a1;
    st.global.v4.b32 [%d1], {{%r2, %r3, %r4, %r5}};
    ld.shared.v4.b32 {{%r6, %r7, %r8, %r9}}, [%r1+512];
    mad.wide.u32 %d1, %t, 16, %a2;
    st.global.v4.b32 [%d1], {{%r6, %r7, %r8, %r9}};
    """
    back = memory.reserve(512)
    run(
        body,
        memory=memory,
        arguments=[source, out, back],
        block=32,
        module=".shared .align 16 .b8 smem[1024];",
    )
    read = values.transpose(0, 2, 1) if transposed else values
    want = [[read[j, i // 4, i % 4 * 2 :][:2].tolist() for j in range(4)] for i in range(32)]
    assert memory.read(out, np.uint16).reshape(32, 4, 2).tolist() == want
    assert memory.read(back, np.uint16).tolist() == values.reshape(-1).tolist()
