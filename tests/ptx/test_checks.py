"""Every check with a planted bug that it must find, and with a correct twin on which it must be silent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.ptx import Memory, PtxError, Reason
from tests.ptx.snippets import run

SHARED = ".shared .align 16 .b8 smem[512];"
_AT = "mad.wide.u32 %d0, %g, 4, %a0;"
_MINE = "mov.u32 %r0, smem;\nmad.lo.s32 %r1, %t, 4, %r0;\nst.shared.u32 [%r1], %t;"
_ONE = "xor.b32 %r2, %t, 1;\nmad.lo.s32 %r2, %r2, 4, %r0;\nld.shared.u32 %r4, [%r2];"
_FAR = "xor.b32 %r2, %t, 32;\nmad.lo.s32 %r2, %r2, 4, %r0;\nld.shared.u32 %r4, [%r2];"
_LAST = "setp.eq.u32 %p0, %t, 63;\n@%p0 st.shared.u32 [%r0], 9;"
_NEXT = "add.s32 %r2, %t, 1;\nand.b32 %r2, %r2, 63;\nmad.lo.s32 %r3, %r2, 4, %r0;"

# name -> reason, wrong body, right body
GLOBAL = {
    "past the end": (
        Reason.OUT_OF_BOUNDS,
        f"{_AT}\nld.global.u32 %r1, [%d0+4];",
        f"{_AT}\nld.global.u32 %r1, [%d0];",
    ),
    "before the start": (
        Reason.OUT_OF_BOUNDS,
        f"{_AT}\nst.global.u32 [%d0+-4], %t;",
        f"{_AT}\nst.global.u32 [%d0], %t;",
    ),
    "null": (
        Reason.OUT_OF_BOUNDS,
        "mov.b64 %d0, 0;\nld.global.u32 %r1, [%d0];",
        f"{_AT}\nld.global.u32 %r1, [%d0];",
    ),
    "misaligned": (
        Reason.MISALIGNED,
        "setp.lt.u32 %p0, %t, 8;\nmad.wide.u32 %d0, %t, 8, %a0;\n@%p0 ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d0];",
        "setp.lt.u32 %p0, %t, 8;\nmad.wide.u32 %d0, %t, 16, %a0;\n@%p0 ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d0];",
    ),
    "two threads write one word": (
        Reason.GLOBAL_RACE,
        "shr.u32 %r1, %t, 1;\nmad.wide.u32 %d0, %r1, 4, %a0;\nst.global.u32 [%d0], %t;",
        f"{_AT}\nst.global.u32 [%d0], %t;",
    ),
    "a neighbour reads without a barrier": (
        Reason.GLOBAL_RACE,
        f"{_AT}\nst.global.u32 [%d0], %t;\nxor.b32 %r1, %t, 32;\nmad.wide.u32 %d1, %r1, 4, %a0;\n"
        "ld.global.u32 %r2, [%d1];",
        f"{_AT}\nst.global.u32 [%d0], %t;\nbar.sync 0;\nxor.b32 %r1, %t, 32;\nmad.wide.u32 %d1, %r1, 4, %a0;\n"
        "ld.global.u32 %r2, [%d1];",
    ),
    "a plain store beside an atomic": (
        Reason.GLOBAL_RACE,
        "red.global.add.u32 [%a0], 1;\nsetp.eq.u32 %p0, %t, 3;\n@%p0 st.global.u32 [%a0], 5;",
        "red.global.add.u32 [%a0], 1;\nred.global.add.u32 [%a0], 2;",
    ),
    "a plain load beside an atomic": (
        Reason.GLOBAL_RACE,
        "ld.global.u32 %r1, [%a0];\nred.global.add.u32 [%a0], 1;",
        "ld.global.u32 %r1, [%a0+4];\nred.global.add.u32 [%a0], 1;",
    ),
}


@pytest.mark.parametrize("name", sorted(GLOBAL))
def test_global_memory(name: str) -> None:
    reason, wrong, right = GLOBAL[name]
    for body, finds in ((wrong, True), (right, False)):
        memory = Memory()
        address = memory.place(np.arange(64, dtype=np.uint32))
        if not finds:
            run(body, memory=memory, arguments=[address])
            continue
        with pytest.raises(PtxError) as found:
            run(body, memory=memory, arguments=[address])
        assert found.value.reason is reason, found.value
        assert found.value.line > 0
        assert found.value.cta == 0
        assert found.value.thread is not None


SHARED_CASES = {
    "past the end": (
        Reason.OUT_OF_BOUNDS,
        "mov.u32 %r0, smem;\nmad.lo.s32 %r1, %t, 8, %r0;\nst.shared.u32 [%r1+8], %t;",
        "mov.u32 %r0, smem;\nmad.lo.s32 %r1, %t, 8, %r0;\nst.shared.u32 [%r1], %t;",
    ),
    "no base": (Reason.OUT_OF_BOUNDS, "shl.b32 %r1, %t, 2;\nst.shared.u32 [%r1], %t;", _MINE),
    "misaligned": (
        Reason.MISALIGNED,
        "mov.u32 %r0, smem;\nmad.lo.s32 %r1, %t, 4, %r0;\nst.shared.v2.u32 [%r1], {%t, %t};",
        "mov.u32 %r0, smem;\nmad.lo.s32 %r1, %t, 8, %r0;\nst.shared.v2.u32 [%r1], {%t, %t};",
    ),
    "uninitialised": (
        Reason.UNINITIALISED,
        f"{_MINE}\nbar.sync 0;\nld.shared.u32 %r5, [%r1+256];",
        f"{_MINE}\nbar.sync 0;\nld.shared.u32 %r5, [%r1];",
    ),
    "read without a barrier": (
        Reason.SHARED_RACE,
        f"{_MINE}\n{_NEXT}\nld.shared.u32 %r4, [%r3];",
        f"{_MINE}\nbar.sync 0;\n{_NEXT}\nld.shared.u32 %r4, [%r3];",
    ),
    "overwritten without a barrier": (
        Reason.SHARED_RACE,
        f"{_MINE}\nbar.sync 0;\n{_NEXT}\nld.shared.u32 %r4, [%r3];\nst.shared.u32 [%r1], %r4;",
        f"{_MINE}\nbar.sync 0;\n{_NEXT}\nld.shared.u32 %r4, [%r3];\nbar.sync 0;\nst.shared.u32 [%r1], %r4;",
    ),
    "two values in one place": (
        Reason.SHARED_RACE,
        "mov.u32 %r0, smem;\nst.shared.u32 [%r0], %t;",
        "mov.u32 %r0, smem;\nst.shared.u32 [%r0], 7;",  # one value from all threads: what compilers emit
    ),
    "lanes without a warp barrier": (
        Reason.SHARED_RACE,
        f"{_MINE}\n{_ONE}",
        f"{_MINE}\nbar.warp.sync 0xffffffff;\n{_ONE}",
    ),
    "a warp barrier between warps": (
        Reason.SHARED_RACE,
        f"{_MINE}\nbar.warp.sync 0xffffffff;\n{_FAR}",
        f"{_MINE}\nbar.sync 0;\n{_FAR}",
    ),
    "half a word beside its whole": (
        Reason.SHARED_RACE,
        f"{_MINE}\n{_NEXT}\nld.shared.u8 %h1, [%r3+3];",
        f"{_MINE}\nld.shared.u8 %h1, [%r1+3];",
    ),
    # The last reader is the writer itself; another one must not be forgotten for it.
    "an earlier reader": (
        Reason.SHARED_RACE,
        f"{_MINE}\nbar.sync 0;\nld.shared.u32 %r4, [%r0];\n{_LAST}",
        f"{_MINE}\nbar.sync 0;\nld.shared.u32 %r4, [%r0];\nbar.sync 0;\n{_LAST}",
    ),
    "ldmatrix without a barrier": (
        Reason.SHARED_RACE,
        f"{_MINE}\nand.b32 %r2, %t, 7;\nmad.lo.s32 %r2, %r2, 16, %r0;\n"
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r2];",
        f"{_MINE}\nbar.sync 0;\nand.b32 %r2, %t, 7;\nmad.lo.s32 %r2, %r2, 16, %r0;\n"
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r2];",
    ),
}


@pytest.mark.parametrize("name", sorted(SHARED_CASES))
def test_shared_memory(name: str) -> None:
    reason, wrong, right = SHARED_CASES[name]
    run(right, module=SHARED)
    with pytest.raises(PtxError) as found:
        run(wrong, module=SHARED, grid=2)
    assert found.value.reason is reason, found.value
    assert found.value.line > 0


_HALF = "setp.lt.u32 %p0, %t, 16;"
CONTROL = {
    "a barrier for some": (
        Reason.DIVERGENT_BARRIER,
        f"{_HALF}\n@%p0 bar.sync 0;\nbar.sync 0;",
        "bar.sync 0;\nbar.sync 0;",
    ),
    "a barrier in one branch": (
        Reason.DIVERGENT_BARRIER,
        f"{_HALF}\n@%p0 bra L1;\nbar.sync 0;\nbra.uni L2;\nL1: mov.u32 %r1, 1;\nbar.sync 0;\nL2: mov.u32 %r2, 2;",
        f"{_HALF}\n@%p0 bra L1;\nmov.u32 %r1, 2;\nbra.uni L2;\nL1: mov.u32 %r1, 1;\nL2: bar.sync 0;",
    ),
    "a barrier after an exit": (
        Reason.DIVERGENT_BARRIER,
        f"{_HALF}\n@%p0 exit;\nbar.sync 0;",
        f"bar.sync 0;\n{_HALF}\n@%p0 exit;",
    ),
    "a shuffle for some": (
        Reason.DIVERGENT_WARP,
        f"{_HALF}\n@%p0 bra L1;\nshfl.sync.bfly.b32 %r1, %t, 1, 31, -1;\nL1: mov.u32 %r2, 2;",
        "shfl.sync.bfly.b32 %r1, %t, 1, 31, -1;",
    ),
    "lanes that are not in their own mask": (
        Reason.DIVERGENT_WARP,
        "mov.u32 %r2, 0x0000ffff;\nredux.sync.add.u32 %r1, %t, %r2;",
        f"{_HALF}\n@!%p0 bra L1;\nmov.u32 %r2, 0x0000ffff;\nredux.sync.add.u32 %r1, %t, %r2;\nL1: mov.u32 %r3, 0;",
    ),
    "reading a lane that takes no part": (
        Reason.UNDEFINED,
        f"{_HALF}\n@!%p0 bra L1;\nshfl.sync.bfly.b32 %r1, %t, 16, 31, 0xffff;\nL1: mov.u32 %r2, 2;",
        f"{_HALF}\n@!%p0 bra L1;\nshfl.sync.bfly.b32 %r1, %t, 8, 31, 0xffff;\nL1: mov.u32 %r2, 2;",
    ),
    "some wait at a barrier, some for them": (
        Reason.DEADLOCK,
        "setp.ge.u32 %p0, %t, 48;\n@%p0 bra L1;\nbar.sync 0;\nL1: shfl.sync.bfly.b32 %r1, %t, 1, 31, -1;",
        "bar.sync 0;\nL1: shfl.sync.bfly.b32 %r1, %t, 1, 31, -1;",
    ),
    "an endless loop": (
        Reason.LIMIT,
        "mov.u32 %r1, 0;\nL1: add.s32 %r1, %r1, 1;\nsetp.ge.s32 %p0, %r1, 0;\n@%p0 bra L1;",
        "mov.u32 %r1, 0;\nL1: add.s32 %r1, %r1, 1;\nsetp.lt.s32 %p0, %r1, 9;\n@%p0 bra L1;",
    ),
    "a register that nobody wrote": (
        Reason.UNINITIALISED,
        "add.s32 %r1, %r2, 1;",
        "mov.u32 %r2, 3;\nadd.s32 %r1, %r2, 1;",
    ),
    "a register that some wrote": (
        Reason.UNINITIALISED,
        f"{_HALF}\n@%p0 mov.u32 %r2, 3;\nadd.s32 %r1, %r2, 1;",
        f"{_HALF}\n@%p0 mov.u32 %r2, 3;\n@%p0 add.s32 %r1, %r2, 1;",
    ),
    "a guard that nobody wrote": (
        Reason.UNINITIALISED,
        "@%p1 mov.u32 %r2, 3;",
        f"{_HALF}\n@%p0 mov.u32 %r2, 3;",
    ),
    "division by zero": (
        Reason.UNDEFINED,
        "rem.u32 %r1, 5, %t;",
        "add.s32 %r2, %t, 1;\nrem.u32 %r1, 5, %r2;",
    ),
    "a trap": (Reason.TRAP, f"{_HALF}\n@%p0 trap;", "setp.gt.u32 %p0, %t, 99;\n@%p0 trap;"),
}


@pytest.mark.parametrize("name", sorted(CONTROL))
def test_control(name: str) -> None:
    reason, wrong, right = CONTROL[name]
    run(right)
    with pytest.raises(PtxError) as found:
        run(wrong)
    assert found.value.reason is reason, found.value
    assert found.value.line > 0
    assert found.value.thread is not None


def test_ctas_are_never_ordered() -> None:
    body = "mad.wide.u32 %d0, {index}, 4, %a0;\nst.global.u32 [%d0], %t;"
    for index, wrong in (("%t", True), ("%g", False)):
        memory = Memory()
        address = memory.reserve(4 * 128)

        def launch(text: str = body.format(index=index), into: Memory = memory, at: int = address) -> None:
            run(text, memory=into, arguments=[at], grid=2)

        if wrong:
            _expect(launch, Reason.GLOBAL_RACE)
        else:
            launch()
            assert memory.read(address, np.uint32).tolist() == list(range(64)) * 2


def _expect(launch: Callable[[], None], reason: Reason) -> None:
    with pytest.raises(PtxError) as found:
        launch()
    assert found.value.reason is reason, found.value


def test_reading_a_ctas_writes_from_another_frame_is_a_race() -> None:
    """The second CTA runs in a later frame: what the first touched is not forgotten."""
    memory = Memory()
    address = memory.place(np.zeros(2048, np.uint32))
    body = "st.global.u32 [%a0+4], 7;\nsetp.gt.u32 %p0, %c, 0;\n@%p0 ld.global.u32 %r1, [%a0+4];"
    _expect(
        lambda: _ignore(run(body, memory=memory, arguments=[address], grid=2, block=1024)), Reason.GLOBAL_RACE
    )
    right = "setp.eq.u32 %p0, %g, 0;\n@%p0 st.global.u32 [%a0+4], 7;"
    run(right, memory=memory, arguments=[address], grid=20, block=1024)
    assert memory.read(address, np.uint32)[1] == 7


def _ignore(_: object) -> None:
    """A counter that a test does not want."""


def test_launches_are_ordered_and_memory_stays_initialised() -> None:
    memory = Memory()
    address = memory.reserve(4 * 64, name="out")
    _expect(
        lambda: _ignore(run("ld.global.u32 %r1, [%a0];", memory=memory, arguments=[address])),
        Reason.UNINITIALISED,
    )
    run(f"{_AT}\nst.global.u32 [%d0], %t;", memory=memory, arguments=[address])
    run(
        "xor.b32 %r1, %t, 5;\nmad.wide.u32 %d0, %r1, 4, %a0;\nst.global.u32 [%d0], %t;",
        memory=memory,
        arguments=[address],
    )
    assert memory.read(address, np.uint32).tolist() == [t ^ 5 for t in range(64)]


def test_what_nobody_wrote_is_seen_by_the_host() -> None:
    memory = Memory()
    address = memory.reserve(8)
    run("setp.eq.u32 %p0, %t, 0;\n@%p0 st.global.u8 [%a0+2], 1;", memory=memory, arguments=[address])
    assert memory.written(address).tolist() == [i == 2 for i in range(8)]
    assert memory.read(address).tolist() == [0xA5, 0xA5, 1, *[0xA5] * 5]
