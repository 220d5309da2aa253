"""Planted bugs in the top-k kernels' PTX, and what notices them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hybridcomm.kernels import TopKSpec, reference
from tests.kernels import cases
from tests.kernels.cases import Case, Floats
from tests.kernels.ptx_topk import Device, kernels_of
from tests.ptx import Kernel
from tests.ptx.conformance import Executable, executable
from tests.ptx.parse import Entry

__all__ = ["check_of", "entry_of"]

LIMIT = 40_000  # instructions in a row: several times what the slowest case takes


def entry_of(spec: TopKSpec, role: str, arch: int) -> Entry:
    """The kernel as compiled."""
    return executable(kernels_of(spec)[role], arch).program.entry


# Sizes that end at each of the elements which one thread has in registers: 4 in a row, from either half of a block.
ENDS = tuple(half + i for half in (4, 516) for i in (1, 2, 3, 4))


def _encodes(spec: TopKSpec, device: Device, role: str) -> bool:
    """Cases in the order of what they notice: ties and a tail, both loops, scales, the flag, every end."""
    chosen = [("nan", spec.block + end) for end in ENDS]
    if role == "encode":
        sizes = {
            "tied": spec.block + 9,
            "heavy": 2 * spec.block,
            "normal": spec.block,
            "denormal": spec.block,
        }
        chosen = [*sizes.items(), ("nan", spec.block), *(("normal", spec.block + end) for end in ENDS)]
    return not any(
        cases.differs(Case(spec=spec, kind=kind, numel=numel, seed=5), device.encode)
        for kind, numel in chosen
    )


def _decodes(spec: TopKSpec, device: Device) -> bool:
    chosen = [(("normal", "heavy", "spike"), spec.block + 9)]
    chosen += [(("normal", "nan"), spec.block + end) for end in ENDS]
    for kinds, numel in chosen:
        payloads = [cases.encoded(Case(spec=spec, kind=kind, numel=numel, seed=3))[1] for kind in kinds]
        want: Floats = cases.values("normal", numel, 99)[0]
        got = want.copy()
        reference.decode_add(spec, payloads, want, 0.25, cases.DIGEST)
        device.decode_add(spec, payloads, got, 0.25)
        if got.tobytes() != want.tobytes():
            return False
    return True


def check_of(spec: TopKSpec, role: str, arch: int) -> Callable[[Entry], bool]:
    """Whether the results are the oracle's when the kernel of this role is another entry."""

    def check(entry: Entry) -> bool:
        program = Kernel(entry)

        def change(built: Executable) -> Executable:
            same = built.kernel.function == kernels_of(spec)[role].function
            return replace(built, program=program, limit=LIMIT) if same else built

        device = Device(arch=arch, change=change)
        return _decodes(spec, device) if role == "decode" else _encodes(spec, device, role)

    return check
