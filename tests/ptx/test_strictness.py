"""What is not known is refused, with its line; what is known is read as it stands."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import Kernel, Memory, PtxError, Reason
from tests.ptx.parse import parse
from tests.ptx.snippets import entry, run

UNKNOWN = (
    "foo.b32 %r0, %r1;",
    "add.ftz.f32 %r0, %r1, %r2;",
    "add.f32 %r0, %t, %t;",  # an assembler may contract it
    "mul.sat.f32 %r0, %t, %t;",
    "div.approx.f32 %r0, %t, %t;",
    "div.full.f32 %r0, %t, %t;",
    "ex2.approx.f32 %r0, %t;",
    "cvt.rz.f32.s32 %r0, %t;",
    "cvt.rn.ftz.f16.f32 %h0, %t;",
    "ld.u32 %r0, [%a0];",  # generic addresses
    "ld.local.u32 %r0, [%a0];",
    "ld.global.L3::cached.u32 %r0, [%a0];",
    "ld.global.v3.u32 {%r0, %r1, %r2}, [%a0];",
    "atom.global.add.f32 %r0, [%a0], %t;",
    "red.global.add.f32 [%a0], %t;",
    "shfl.up.b32 %r0, %t, 1, 0;",
    "redux.sync.mul.s32 %r0, %t, -1;",
    "bar.sync 1;",
    "bar.sync 0, 32;",
    "bar.arrive 0, 64;",
    "mov.u32 %r0, nowhere;",
    "wgmma.fence.sync.aligned;",
)
WRONG = (
    "add.s32 %r0, %t;",
    "add.s32 %r0, %t, %t, %t;",
    "add.s32 %r0, %d0, %t;",
    "add.s64 %r0, %d0, %d0;",
    "add.s32 %p0, %t, %t;",
    "add.s32 5, %t, %t;",
    "add.s32 %r0, %t, 0f3F800000;",
    "add.rn.f32 %r0, %t, 1;",
    "add.s32 %r0, %t, 4294967296;",
    "add.s32 %r0, %t, !%t;",
    "add.s32 %q0, %t, %t;",
    "mov.b64 %d0, {%t, %h0};",
    "ld.global.v2.u32 {%r0}, [%a0];",
    "@%t mov.u32 %r0, 1;",
    "bra nowhere;",
    ".local .b32 x;",
    "%r0 = 5;",
    "call (%r0), f, (%t);",
)


@pytest.mark.parametrize(
    ("text", "reason"), [*((t, Reason.UNSUPPORTED) for t in UNKNOWN), *((t, Reason.SYNTAX) for t in WRONG)]
)
def test_it_is_refused_with_its_line(text: str, reason: Reason) -> None:
    body = f"mov.u32 %r9, 1;\n{text}"
    line = entry(body).split("\n").index(text) + 1
    memory = Memory()
    with pytest.raises(PtxError) as found:
        run(body, memory=memory, arguments=[memory.place(np.zeros(4, np.uint64))])
    assert found.value.reason is reason, found.value
    assert found.value.line == line
    assert text.split(maxsplit=1)[0].rstrip(";") in str(found.value)


def test_even_where_nobody_comes() -> None:
    with pytest.raises(PtxError, match="foo"):
        run("bra.uni L1;\nfoo.b32 %r0, %r1;\nL1: mov.u32 %r2, 1;")


def test_an_entry_without_end_is_refused() -> None:
    for text, message in (
        (entry("").replace("ret;", ""), "end of the text"),
        (entry("")[:-3], "closing brace"),
        (entry("@%p0 bra L1;\nL1: setp.eq.u32 %p0, %t, 0;").replace("ret;", "@%p0 ret;"), "end of the text"),
        ("", "entry None"),
    ):
        with pytest.raises(PtxError, match=message):
            Kernel(text)


def test_scopes_hide_registers() -> None:
    memory = Memory()
    out = memory.reserve(4)
    body = (
        "mov.u32 %r1, 5;\n{ .reg .b32 %r1; mov.u32 %r1, 9; { .reg .pred p; setp.eq.u32 p, %r1, 9; } }\n"
        "setp.eq.u32 %p0, %t, 0;\n@%p0 st.global.u32 [ %a0 + 0 ], { %r1 };"
    )
    run(body, memory=memory, arguments=[out])
    assert memory.read(out, np.uint32)[0] == 5


def test_inline_assembly_and_comments_keep_lines() -> None:
    text = entry(
        "/* one\n two */\n\t// begin inline asm\n\t.loc\t1 2 3\n\t@!%p1 add.s32 %r0,\n %t, 1; // end\n$L1:\n\tnop;"
    )
    instruction = next(i for i in parse(text).instructions if i.mnemonic == "add.s32")
    assert "add.s32" in text.split("\n")[instruction.line - 1]
    assert (instruction.guard, instruction.negated) == ("%p1", True)


def test_of_several_entries_one_is_chosen() -> None:
    both = entry("") + entry("mov.u32 %r1, 1;").partition(".address_size 64")[2].replace(
        ".entry k(", ".entry other("
    )
    assert parse(both, "other").name == "other"
    assert len(parse(both, "other").instructions) == len(parse(both, "k").instructions) + 1
    with pytest.raises(PtxError, match="there are"):
        parse(both)


def test_arguments_are_checked() -> None:
    kernel = Kernel(entry("", parameters=2))
    for arguments in ([1, 2, 3], [1 << 64, 0], [0.5, 0], [b"123", 0]):
        with pytest.raises(PtxError) as found:
            kernel.launch(Memory(), arguments, grid=1, block=32)
        assert found.value.reason is Reason.ARGUMENTS
    for block in (0, 33, 2048):
        with pytest.raises(PtxError, match="whole warps"):
            kernel.launch(Memory(), [0, 0], grid=1, block=block)
    kernel.launch(Memory(), [5], grid=1, block=32)  # pointers behind the last argument are null


def test_a_required_block_is_kept() -> None:
    kernel = Kernel(entry("", directives=".reqntid 64"))
    assert kernel.launch(Memory(), [0], grid=2).opcodes["ret"] == 128
    with pytest.raises(PtxError, match="reqntid"):
        kernel.launch(Memory(), [0], grid=1, block=32)
