"""The static gate: what machine code and PTX of a kernel must and must not hold; measured, then judged by its budget.

Needs nvdisasm (in Triton's wheel), no GPU. Rules
    spill          no stack, no access to local memory
    registers      at most the budget's, per thread
    shared         at most what a block gets without asking
    wide           arrays of floats that the byte budget allows to be streamed are, in accesses of 128 bits or more
    narrow         smaller accesses to them that always run move no more than the budget leaves beside the streams
    occupancy      resident blocks have so many loads under way that latency is not what sets the rate (`roof.predict`)
    instructions   code without loops has no more than the budget, per element; of the rest tests count what is executed
    contraction, approximate, flush, rounding, float atomic
                   no instruction whose result is not the oracle's, or depends on order or compiler
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from hybridcomm.kernels.cubins import elf, roof, sass, streams, tools
from hybridcomm.kernels.cubins.gpu import GPUS
from hybridcomm.kernels.cubins.manifest import Build, Figures, Stream
from hybridcomm.kernels.device import DeviceKernel

__all__ = ["Violation", "forbidden", "judge", "measure"]

SHARED = 48 * 1024  # bytes per block that need no attribute to be set
WIDE = 16  # bytes of one access
SMALL = 0.1  # of what a loop moves in wide accesses may go beside them in smaller ones
_FLOATS = {"*fp32": 4, "*fp16": 2, "*bf16": 2}
_FLOAT = r"(?:f16|f16x2|bf16|bf16x2|f32|f32x2|f64)"
_PTX = {
    "approximate": r"\.approx\b|\bdiv\.full|\btanh|\bex2\b",
    # Packed operations: ptxas of CUDA 12.9, and so drivers, fuse them in spite of .rn and --fmad=false.
    "contraction": rf"\bfma\.|\bmad\.(?:\w+\.)*{_FLOAT}\b|^(?:add|sub|mul)\.(?:\w+\.)*f32x2\b",
    "flush": r"\.ftz\b",
    "rounding": rf"^(?:add|sub|mul)\.{_FLOAT}\b",  # without .rn the driver's compiler may fuse them
    "float atomic": rf"\b(?:atom|red)\.[\w.:]*{_FLOAT}\b",
}
_SASS = {
    "approximate": r"MUFU\b",
    "contraction": r"[FDH]FMA2?\b|FFMA32I\b",
    "flush": r"(?!MUFU|ATOM|RED)[\w.]*\.FTZ\b",
    "float atomic": r"(?:ATOM|ATOMG|ATOMS|RED|REDG)\.(?:\w+\.)*(?:F16|F16x2|BF16|BF16x2|BF16_V2|F16_V2|F32|F64)\b",
}


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A broken rule: its name, and by what."""

    rule: str
    detail: str


def _moves_a_constant(instruction: sass.Instruction) -> bool:
    """Compilers load halves with HFMA2 of zeros, to use an idle pipe: nothing is rounded."""
    return instruction.base == "HFMA2" and instruction.operands.count("RZ") >= 2


def forbidden(code: tuple[sass.Instruction, ...], ptx: str) -> tuple[tuple[str, str], ...]:
    """What of the machine code and of the PTX must not be there: (rule, what)."""
    found = []
    for rule, pattern in _SASS.items():
        for instruction in code:
            if re.match(pattern, instruction.opcode) and not _moves_a_constant(instruction):
                found.append((rule, instruction.opcode))
    for rule, pattern in _PTX.items():
        for _, opcode, _ in streams.instructions(ptx):
            if re.search(pattern, opcode):
                found.append((rule, f"{opcode} in PTX"))
    return tuple(dict.fromkeys(found))


def _streams(kernel: DeviceKernel, ptx: str) -> tuple[Stream, ...]:
    per_element = 32 * kernel.num_warps / kernel.elements
    moved: Counter[tuple[int, bool, str]] = Counter()
    for access in streams.accesses(ptx):
        kind = "wide" if access.nbytes >= WIDE else "guarded" if access.guarded else "narrow"
        for parameter in access.parameters:
            moved[parameter, access.store, kind] += access.nbytes
    return tuple(
        Stream(
            name=argument.name,
            store=store,
            itemsize=_FLOATS[argument.type],
            **{kind: moved[i, store, kind] * per_element for kind in ("wide", "narrow", "guarded")},
        )
        for i, argument in enumerate(kernel.arguments)
        for store in (False, True)
        if argument.type in _FLOATS
        and argument.name not in kernel.touched
        and any(moved[i, store, kind] for kind in ("wide", "narrow", "guarded"))
    )


def measure(kernel: DeviceKernel, cubin: bytes, ptx: str) -> Figures:
    """Figures of one cubin and of the PTX that it was assembled from.

    Raises:
        BuildError: nvdisasm is missing or refuses the cubin.
    """
    told, code = elf.read(cubin), sass.parse(tools.disassemble(cubin))
    per_element = 32 * kernel.num_warps / kernel.elements
    pipes, looped = (Counter(map(sass.pipe, part)) for part in (code.instructions, code.looped))
    return Figures(
        frame=told.frame,
        local=sum(instruction.base in ("LDL", "STL") for instruction in code.instructions),
        instructions=len(code.instructions) * per_element,
        pipes={name: count * per_element for name, count in sorted(pipes.items())},
        loops=code.loops,
        looped={name: count * per_element for name, count in sorted(looped.items())},
        streams=_streams(kernel, ptx),
        forbidden=forbidden(code.instructions, ptx),
    )


def _judge_streams(kernel: DeviceKernel, build: Build) -> list[Violation]:
    """Arrays that do not fit into the byte budget are not streamed, but touched here and there: nothing to ask."""
    figures, ideal = build.figures, roof.streamed(kernel, build)
    left = kernel.budget.nbytes - ideal
    if not ideal:
        return []
    found = []
    for stream in filter(roof.carries, figures.streams):
        small = stream.narrow + stream.guarded
        # What stands in a loop once runs often: then its share counts.
        in_loops = figures.loops > 0 and small <= SMALL * stream.wide
        if stream.wide < stream.itemsize and not in_loops:
            how = f"{stream.wide:.2f} of {stream.itemsize} bytes per element in 128 bits, {small:.2f} in less"
            found.append(
                Violation(
                    rule="wide", detail=f"{stream.name} {'stored' if stream.store else 'loaded'}: {how}"
                )
            )
    narrow = sum(stream.narrow for stream in figures.streams)
    if narrow > left:
        found.append(Violation(rule="narrow", detail=f"{narrow:.2f} bytes per element, {left:.2f} are left"))
    if roof.predict(kernel, build).limit == "latency" and not kernel.tail:
        got, wanted = roof.under_way(kernel, build), GPUS[build.arch].in_flight
        detail = f"{got:.0f} bytes under way per SM, {wanted:.0f} keep the memory busy"
        found.append(Violation(rule="occupancy", detail=detail))
    return found


def judge(kernel: DeviceKernel, build: Build) -> tuple[Violation, ...]:
    """The rules that a kernel breaks on one architecture; none if all is well."""
    budget, figures, shared = kernel.budget, build.figures, build.static_shared + build.dynamic_shared
    found = [Violation(rule=rule, detail=what) for rule, what in figures.forbidden]
    if figures.frame or figures.local:
        found.append(
            Violation(rule="spill", detail=f"{figures.frame} bytes of stack, {figures.local} local accesses")
        )
    if build.registers > budget.registers:
        found.append(
            Violation(rule="registers", detail=f"{build.registers}, the budget is {budget.registers}")
        )
    if shared > SHARED:
        found.append(Violation(rule="shared", detail=f"{shared} bytes, a block gets {SHARED} unasked"))
    most = budget.instructions if budget.cold is None else budget.cold
    counted = roof.counted(kernel, build)
    if counted is not None and counted > most:
        detail = f"{counted:.1f} per element, the budget is {most:g}"
        found.append(Violation(rule="instructions", detail=detail))
    return (*found, *_judge_streams(kernel, build))
