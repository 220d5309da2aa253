"""The mutation harness on a kernel that it can be held against by hand: the sum of a CTA's numbers."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import Kernel, Memory, PtxError, Reason
from tests.ptx.mutate import barrier_mutants, judge, never_read, opcode_mutants, orders_nothing, tally
from tests.ptx.parse import Entry, parse
from tests.ptx.snippets import entry

BODY = """
    mov.u32 %r0, smem;
    mad.wide.u32 %d0, %g, 4, %a0;
    ld.global.u32 %r1, [%d0];
    mov.u32 %r9, 17;
    redux.sync.add.u32 %r1, %r1, -1;
    shr.u32 %r2, %t, 5;
    mad.lo.s32 %r3, %r2, 4, %r0;
    bar.sync 0;
    st.shared.u32 [%r3], %r1;
    bar.sync 0;
    ld.shared.v2.u32 {%r4, %r5}, [%r0];
    add.s32 %r6, %r4, %r5;
    setp.eq.u32 %p0, %t, 0;
    mad.wide.u32 %d1, %c, 4, %a1;
    @%p0 st.global.u32 [%d1], %r6;
"""
SUM = parse(entry(BODY, parameters=2, module=".shared .align 8 .b8 smem[8];"))


def check(program: Entry) -> bool:
    values = np.random.default_rng(3).integers(1, 1000, (3, 64)).astype(np.uint32)
    memory = Memory()
    source, out = memory.place(values), memory.reserve(12)
    Kernel(program).launch(memory, [source, out], grid=3, block=64)
    return memory.read(out, np.uint32).tolist() == values.sum(axis=1).tolist()


def test_the_kernel_is_right() -> None:
    assert check(SUM)


def test_a_deleted_barrier_is_caught_unless_it_orders_nothing() -> None:
    first, second = (judge(mutant, check) for mutant in barrier_mutants(SUM))
    assert (first.outcome, orders_nothing(SUM, first.mutant.index)) == ("survived", True)
    assert (second.outcome, orders_nothing(SUM, second.mutant.index)) == (Reason.SHARED_RACE.value, False)


def test_opcode_mutants_are_caught_unless_nobody_reads_them() -> None:
    verdicts = [judge(m, check) for seed in range(4) for m in opcode_mutants(SUM, count=20, seed=seed)]
    survivors = {str(v.mutant) for v in verdicts if not v.caught and not never_read(v.mutant)}
    assert not survivors, survivors
    assert any(not v.caught and never_read(v.mutant) for v in verdicts)  # %r9 is never read
    assert {"wrong result", Reason.OUT_OF_BOUNDS.value} <= set(tally(verdicts))


def test_samples_are_deterministic_and_differ_by_seed() -> None:
    first, again, other = ([str(m) for m in opcode_mutants(SUM, count=9, seed=seed)] for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == len(set(first)) == 9


def test_a_mutant_that_is_no_program_is_no_catch() -> None:
    (mutant, *_) = barrier_mutants(SUM)

    def broken(_: Entry) -> bool:
        raise PtxError(Reason.SYNTAX, "planted")

    with pytest.raises(PtxError, match="planted"):
        judge(mutant, broken)
