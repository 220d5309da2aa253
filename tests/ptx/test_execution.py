"""Loops, divergence, atomics, widths and what is counted, on programs whose results are known."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import Kernel, Memory, PtxError, Reason
from tests.ptx.snippets import entry, run

_OUT = "mad.wide.u32 %d0, %g, 4, %a0;\nst.global.u32 [%d0], %r1;"


def _results(body: str, *, grid: int = 1, block: int = 64, shared: int = 0, module: str = "") -> list[int]:
    """What each thread leaves in ``%r1``."""
    memory = Memory()
    out = memory.reserve(4 * grid * block)
    run(
        f"{body}\n{_OUT}",
        memory=memory,
        arguments=[out],
        grid=grid,
        block=block,
        shared=shared,
        module=module,
    )
    return [int(value) for value in memory.read(out, np.uint32)]


def test_threads_leave_a_loop_one_by_one() -> None:
    body = """
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
L1: add.s32 %r1, %r1, %r2;
    add.s32 %r2, %r2, 1;
    setp.le.u32 %p0, %r2, %g;
    @%p0 bra L1;
    """
    assert _results(body, grid=3) == [g * (g + 1) // 2 for g in range(192)]


def test_branches_meet_again() -> None:
    """A shuffle after a branch needs the whole warp: whoever was ahead waits."""
    body = """
    and.b32 %r2, %t, 1;
    setp.eq.u32 %p0, %r2, 0;
    @%p0 bra L1;
    add.s32 %r3, %t, 100;
    bra.uni L2;
L1: add.s32 %r3, %t, 200;
L2: shfl.sync.bfly.b32 %r1, %r3, 1, 31, -1;
    """
    assert _results(body) == [(t ^ 1) + (100 if (t ^ 1) & 1 else 200) for t in range(64)]


_INDEXED = """
TABLE: .branchtargets L1, L2, L3;
    rem.u32 %r2, %t, {count};
    brx.idx %r2, TABLE;
L1: mov.u32 %r1, 10;
    bra.uni L4;
L2: mov.u32 %r1, 20;
    bra.uni L4;
L3: mov.u32 %r1, 30;
L4: add.s32 %r1, %r1, %r2;
"""


def test_an_index_chooses_where_threads_go() -> None:
    for count in (3, 2, 1):
        assert _results(_INDEXED.replace("{count}", str(count))) == [
            (10, 21, 32)[t % count] for t in range(64)
        ]


def test_an_index_beyond_its_table_is_reported() -> None:
    with pytest.raises(PtxError, match="more than the 3 targets") as caught:
        _results(_INDEXED.replace("{count}", "4"))
    assert (caught.value.reason, caught.value.thread) == (Reason.UNDEFINED, 3)
    with pytest.raises(PtxError, match="no label"):
        _results(_INDEXED.replace("L1, L2, L3", "L1, L9"))


def test_ctas_loop_past_barriers_at_their_own_pace() -> None:
    body = """
    mov.u32 %r9, smem;
    mad.lo.s32 %r8, %t, 4, %r9;
    xor.b32 %r7, %t, 32;
    mad.lo.s32 %r7, %r7, 4, %r9;
    mov.u32 %r1, %t;
    mov.u32 %r2, 0;
L1: st.shared.u32 [%r8], %r1;
    bar.sync 0;
    ld.shared.u32 %r1, [%r7];
    bar.sync 0;
    add.s32 %r2, %r2, 1;
    setp.le.u32 %p0, %r2, %c;
    @%p0 bra L1;
    """
    module = ".extern .shared .align 16 .b8 smem[];"
    got = _results(body, grid=5, shared=256, module=module)
    assert got == [t ^ 32 if c % 2 == 0 else t for c in range(5) for t in range(64)]


def test_atomics_add_up_and_return_what_was_there() -> None:
    memory = Memory()
    total, out = memory.place(np.zeros(2, np.uint64)), memory.reserve(4 * 192)
    body = f"""
    red.global.add.u64 [%a1+8], 3;
    atom.global.gpu.acq_rel.add.u32 %r1, [%a1], 1;
    {_OUT}
    """
    counters = run(body, memory=memory, arguments=[out, total], grid=3)
    assert memory.read(total, np.uint64).tolist() == [192, 3 * 192]
    assert sorted(memory.read(out, np.uint32).tolist()) == list(range(192))
    assert counters.traffic["atom.global"].accesses == 2 * 192


@pytest.mark.parametrize(
    ("name", "kind", "law"),
    [
        ("min", "s32", min),
        ("max", "u32", lambda v: max(x % (1 << 32) for x in v)),
        ("or", "b32", lambda v: int(np.bitwise_or.reduce(np.array(v)))),
        ("xor", "b32", lambda v: int(np.bitwise_xor.reduce(np.array(v)))),
    ],
)
def test_atomic_operations(name: str, kind: str, law: object) -> None:
    memory = Memory()
    values = np.random.default_rng(7).integers(-(1 << 31), 1 << 31, 64).astype(np.int32)
    source, word = memory.place(values), memory.place(values[:1])
    body = f"mad.wide.u32 %d0, %t, 4, %a0;\nld.global.u32 %r1, [%d0];\natom.global.{name}.{kind} %r2, [%a1], %r1;"
    run(body, memory=memory, arguments=[source, word])
    want = law([*values.tolist(), *([int(values[0])] if name == "xor" else [])])  # type: ignore[operator]
    assert int(memory.read(word, np.int32)[0]) % (1 << 32) == want % (1 << 32)


def test_compare_and_swap_lets_one_through() -> None:
    memory = Memory()
    word, out = memory.place(np.zeros(1, np.uint32)), memory.reserve(4 * 64)
    body = f"add.s32 %r2, %t, 1;\natom.global.cas.b32 %r1, [%a1], 0, %r2;\n{_OUT}"
    run(body, memory=memory, arguments=[out, word])
    assert memory.read(out, np.uint32).tolist().count(0) == 1


def test_narrow_accesses_extend_by_their_sign() -> None:
    memory = Memory()
    source = memory.place(np.array([0x80, 0x7F, 0xFF, 0x81], np.uint8))
    outs = [memory.reserve(4) for _ in range(3)]
    body = """
    ld.global.s8 %r1, [%a0];
    ld.global.u8 %r2, [%a0];
    ld.global.s16 %r3, [%a0+2];
    setp.eq.u32 %p0, %t, 0;
    @%p0 st.global.u32 [%a1], %r1;
    @%p0 st.global.u32 [%a2], %r2;
    @%p0 st.global.u32 [%a3], %r3;
    """
    run(body, memory=memory, arguments=[source, *outs])
    assert [int(memory.read(out, np.int32)[0]) for out in outs] == [-128, 128, -32257]


def test_wide_accesses_move_what_they_say() -> None:
    memory = Memory()
    values = np.arange(64 * 8, dtype=np.uint32)
    source, out = memory.place(values), memory.reserve(values.nbytes)
    body = """
    mad.wide.u32 %d0, %t, 32, %a0;
    mad.wide.u32 %d1, %t, 32, %a1;
    ld.global.nc.L1::no_allocate.v8.b32 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%d0];
    .reg .b128 %q;
    .reg .b64 %x<4>;
    mov.b64 %x0, {%r1, %r2};
    mov.b64 %x1, {%r3, %r4};
    mov.b128 %q, {%x0, %x1};
    st.global.b128 [%d1], %q;
    st.global.v4.b32 [%d1+16], {%r5, %r6, %r7, %r8};
    """
    counters = run(body, memory=memory, arguments=[source, out])
    assert memory.read(out, np.uint32).tolist() == values.tolist()
    assert counters.loaded.widths == {32: 64}
    assert counters.stored.widths == {16: 128}
    assert counters.loaded.nbytes == counters.stored.nbytes == values.nbytes


def test_device_memory_moves_each_sector_once() -> None:
    """64 threads read words a stride apart, twice, and write one sector: whatever was asked for, again and again."""
    for stride, sectors in ((4, 8), (8, 16), (32, 64), (0, 1)):
        body = f"mad.wide.u32 %d0, %t, {stride}, %a0;\nld.global.u32 %r1, [%d0];\nld.global.u32 %r2, [%d0];"
        body += "\natom.global.add.u32 %r3, [%a1], 1;"
        memory = Memory()
        source, out = memory.place(np.zeros(64 * 8, np.uint32)), memory.place(np.zeros(16, np.uint32))
        assert run(body, memory=memory, arguments=[source, out]).moved == 32 * (sectors + 2)


def test_instructions_and_barriers_are_counted() -> None:
    body = "bar.sync 0;\nsetp.lt.u32 %p0, %t, 8;\n@%p0 bra L1;\nnot.b32 %r1, %t;\nL1: neg.s32 %r2, %t;"
    counters = run(body, grid=3)
    assert counters.barriers == 3
    assert (counters.opcodes["not.b32"], counters.opcodes["neg.s32"]) == (3 * 56, 3 * 64)
    every, skipped = 5 + 5 + 1, 8  # a snippet begins with five, ends with one; eight threads skip the fourth
    assert counters.instructions == 3 * (64 * every - skipped)


def test_numbers_of_threads_in_three_dimensions() -> None:
    memory = Memory()
    out = memory.reserve(4 * 64 * 6)
    body = """
    mov.u32 %r1, %tid.y;
    mov.u32 %r2, %tid.x;
    mad.lo.s32 %r3, %r1, 16, %r2;
    mov.u32 %r4, %ctaid.y;
    mov.u32 %r5, %ctaid.x;
    mov.u32 %r6, %nctaid.x;
    mad.lo.s32 %r7, %r4, %r6, %r5;
    mad.lo.s32 %r8, %r7, 64, %r3;
    mad.wide.u32 %d0, %r8, 4, %a0;
    mad.lo.s32 %r9, %r4, 100, %r1;
    st.global.u32 [%d0], %r9;
    """
    Kernel(entry(body)).launch(memory, [out], grid=(3, 2, 1), block=(16, 4, 1))
    want = [y * 100 + ty for y in range(2) for _ in range(3) for ty in range(4) for _ in range(16)]
    assert memory.read(out, np.uint32).tolist() == want


def test_a_place_beyond_all_buffers_names_the_nearest() -> None:
    memory = Memory()
    address = memory.place(np.zeros(4, np.uint32), name="small")
    with pytest.raises(PtxError, match="byte 16 of small, which has 16") as found:
        run("ld.global.u32 %r1, [%a0+16];", memory=memory, arguments=[address])
    assert found.value.reason is Reason.OUT_OF_BOUNDS
