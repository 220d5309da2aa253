"""Small kernels written by hand, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.ptx import Counters, Kernel, Memory, types
from tests.ptx.types import Array

__all__ = ["apply", "entry", "run"]


def entry(body: str, *, parameters: int = 1, directives: str = "", module: str = "") -> str:
    """A kernel ``k`` with pointers ``%a0``, ``%a1``, ...; a thread is ``%t`` of its CTA ``%c``, and ``%g`` of all."""
    names = ", ".join(f".param .u64 .ptr .global .align 1 p{i}" for i in range(parameters))
    loads = "\n".join(f"    ld.param.u64 %a{i}, [p{i}];" for i in range(parameters))
    return f"""
.version 8.0
.target sm_90
.address_size 64
{module}
.visible .entry k({names})
{directives}
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<19>;
    .reg .b64 %d<9>;
    .reg .b64 %a<{parameters + 1}>;
    .reg .b32 %t, %g, %c;
    mov.u32 %t, %tid.x;
    mov.u32 %c, %ctaid.x;
    mov.u32 %g, %ntid.x;
    mad.lo.s32 %g, %g, %c, %t;
{loads}
{body}
    ret;
}}
"""


def run(
    body: str, *, memory: Memory | None = None, arguments: Sequence[int] = (), grid: int = 1, block: int = 64,
    shared: int = 0, module: str = "", limit: int = 10_000,
) -> Counters:  # fmt: skip
    """Launch a snippet."""
    text = entry(body, parameters=max(len(arguments), 1), module=module)
    return Kernel(text).launch(
        memory or Memory(), arguments or [0], grid=grid, block=block, shared=shared, limit=limit
    )


def _load(kind: str, i: int) -> str:
    """Column ``i`` into a register ``%x{i}``; every value has a place of 8 bytes."""
    width = 32 if kind == "pred" else types.bits(kind)
    lines = [f"mad.wide.u32 %d0, %g, 8, %a{i};"]
    if width < 16:
        lines += [f".reg .b16 %x{i};", f"ld.global.b{width} %x{i}, [%d0];"]
    elif kind == "pred":
        lines += [f".reg .b32 %w{i};", f".reg .pred %x{i};", f"ld.global.b32 %w{i}, [%d0];"]
        lines += [f"setp.ne.b32 %x{i}, %w{i}, 0;"]
    else:
        lines += [f".reg .b{width} %x{i};", f"ld.global.b{width} %x{i}, [%d0];"]
    return "\n".join(lines)


def apply(mnemonic: str, result: str, *columns: tuple[str, Array], tail: str = "") -> Array:
    """The results of one instruction for every row of ``columns`` (type, values (n,)), as numpy's ``result`` type.

    ``tail``: operands behind those of the columns. Parts of packed types lie in a last axis.
    """
    rows = len(columns[0][1])
    padded, memory = -(-rows // 32) * 32, Memory()
    places = []
    for kind, values in columns:
        slots = np.zeros((padded, 8), np.uint8)
        raw = np.asarray(values, np.uint32 if kind == "pred" else None)
        raw = np.ascontiguousarray(raw).reshape(rows, -1).view(np.uint8)
        slots[:rows, : raw.shape[1]] = raw
        slots[rows:] = slots[0]
        places.append(memory.place(slots))
    width = 16 if types.bits(result) == 8 else types.bits(result)
    out = memory.reserve(8 * padded)
    target = ".reg .pred %y;\n.reg .b32 %z;" if result == "pred" else f".reg .b{width} %y;"
    stored = (
        "selp.b32 %z, 1, 0, %y;\nst.global.b32 [%d0], %z;"
        if result == "pred"
        else f"st.global.b{width} [%d0], %y;"
    )
    names = ", ".join(f"%x{i}" for i in range(len(columns)))
    body = "\n".join(_load(kind, i) for i, (kind, _) in enumerate(columns))
    body += f"\n{target}\n{mnemonic} %y, {names}{tail};\nmad.wide.u32 %d0, %g, 8, %a{len(columns)};\n{stored}"
    text = entry(body, parameters=len(columns) + 1)
    Kernel(text).launch(memory, [*places, out], grid=padded // 32, block=32)
    slots = memory.read(out).reshape(padded, 8)[:rows]
    if result == "pred":
        return np.asarray(slots[:, 0] != 0)
    raw = np.ascontiguousarray(slots[:, : types.bits(result) // 8])
    return types.view(raw.view(f"u{types.bits(result) // 8}")[:, 0], result)
