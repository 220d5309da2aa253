"""How fast a kernel can stream its arrays on the GPU that stands for an architecture, from its machine code.

Time per element is the longest of what memory, issue slots and each pipe need, as if all overlapped (Williams,
Waterman, Patterson 2009, doi 10.1145/1498765.1498785). Nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybridcomm.kernels.cubins import executed
from hybridcomm.kernels.cubins.gpu import GPUS, Gpu, Occupancy, occupancy
from hybridcomm.kernels.cubins.manifest import Build, Stream
from hybridcomm.kernels.device import DeviceKernel

__all__ = [
    "ADD",
    "DRAM",
    "ISSUE",
    "OVERHEAD",
    "Prediction",
    "affordable",
    "carries",
    "counted",
    "in_order",
    "predict",
    "resident",
    "straight",
    "streamed",
    "under_way",
    "work",
]

DRAM = 0.92  # of the bandwidth on the data sheet, for reads and writes mixed
ISSUE = 0.90  # of the issue slots and of each pipe
OVERHEAD = 1.02  # by which the byte budgets exceed what must be moved
ADD = 4  # cycles from the operands of an fp32 addition to what another one can take
_RARE = ("withdraw", "spoil")
"""Functions that return at once, unless a payload is flagged: nobody waits for them."""
_FIXED = 1 << 40
"""Elements: kernels with as many programs for any region say more than that of each."""


def resident(kernel: DeviceKernel, build: Build) -> Occupancy:
    """Blocks of a kernel that an SM of its architecture holds at once."""
    shared = build.static_shared + build.dynamic_shared
    return occupancy(GPUS[build.arch], registers=build.registers, warps=kernel.num_warps, shared=shared)


def under_way(kernel: DeviceKernel, build: Build) -> float:
    """Bytes that the resident blocks of an SM load from arrays in wide accesses, each of its blocks all at once."""
    loads = sum(stream.wide for stream in build.figures.streams if not stream.store) * kernel.elements
    return loads * resident(kernel, build).blocks


def carries(stream: Stream) -> bool:
    """Whether it is more than a few elements that are looked at again, under a condition."""
    return stream.wide + stream.narrow > 0 or stream.guarded >= stream.itemsize / 2


def streamed(kernel: DeviceKernel, build: Build) -> int:
    """Bytes per element of the arrays of floats that a kernel normally reads or writes as a whole; 0 if it does not, or
    if a large region has no more programs than a small one."""
    ideal = sum(stream.itemsize for stream in filter(carries, build.figures.streams))
    rare = any(word in kernel.function for word in _RARE)
    return ideal if ideal <= kernel.budget.nbytes and not rare and kernel.elements < _FIXED else 0


def in_order(rank: int, rows: int) -> int:
    """Additions of powersgd's encoder that wait for each other in a region of so many rows of its matrix.

    An entry of P has 512 terms in 16 partial sums; a dot product of two columns has a term per row, likewise, and
    rank (rank + 1) - 1 of these are formed one after the other; an entry of Q has a term per row.
    """
    halves = 4
    return 512 // 16 + halves + (rank * (rank + 1) - 1) * (-(-rows // 16) + halves) + rows


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """``rate``: elements/s; ``share``: of the roof; ``limit``: what sets the rate."""

    rate: float
    share: float
    limit: str


def counted(kernel: DeviceKernel, build: Build) -> float | None:
    """Instructions of machine code per element, static, loops as often as they run at most; None: nobody knows."""
    if build.figures.loops and kernel.trips is None:
        return None
    return build.figures.instructions + _again(kernel) * sum(build.figures.looped.values())


def _again(kernel: DeviceKernel) -> int:
    return 0 if kernel.trips is None else max(kernel.trips - 1, 0)


def straight(kernel: DeviceKernel, build: Build) -> bool:
    """Whether machine code says what an element costs: it is known how often loops run, there are no cases of which a
    program runs one, and programs are for so many elements each."""
    return counted(kernel, build) is not None and kernel.budget.cold is None and kernel.elements < _FIXED


def work(kernel: DeviceKernel, build: Build, more: float = 0.0) -> dict[str, float]:
    """Instructions of a thread per element, by pipe; ``issue`` is all of them. ``more``: beside what is counted."""
    figures, pipes, static = build.figures, dict(build.figures.pipes), counted(kernel, build)
    if static is not None and straight(kernel, build):
        once = static
        for name, count in figures.looped.items():
            pipes[name] += _again(kernel) * count
    else:
        once, static = executed.instructions(kernel.name, build.arch), figures.instructions
    total = once + more
    return {**{name: count * total / static for name, count in pipes.items()}, "issue": total}


def affordable(gpu: Gpu, nbytes: float, pipe: str, share: float) -> float:
    """Instructions of a thread per element that a pipe (or ``issue``) has time for, where elements of ``nbytes`` bytes
    that must be moved come at a ``share`` of the roof."""
    per_clock = gpu.issue if pipe == "issue" else gpu.rates[pipe]
    return per_clock * gpu.sms * gpu.clock * ISSUE / (share * gpu.bandwidth / nbytes)


def predict(
    kernel: DeviceKernel, build: Build, *, nbytes: float = 0.0, instructions: float = 0.0
) -> Prediction:
    """A streaming kernel on the GPU that stands for the architecture of ``build``.

    ``nbytes``, ``instructions``: per element, beside what the budget and `work` count, as of further payloads.
    """
    gpu, moved = GPUS[build.arch], kernel.budget.nbytes + nbytes
    loads = under_way(kernel, build)
    kept_busy = min(1.0, loads / gpu.in_flight) if loads else 1.0
    seconds = {"memory" if kept_busy == 1.0 else "latency": moved / (gpu.bandwidth * DRAM * kept_busy)}
    for name, count in work(kernel, build, instructions).items():
        per_clock = gpu.issue if name == "issue" else gpu.rates[name]
        seconds[name] = count / (per_clock * gpu.sms * gpu.clock * ISSUE)
    limit = max(seconds, key=lambda name: seconds[name])
    rate = 1 / seconds[limit]
    roof = gpu.bandwidth / (moved / OVERHEAD)
    return Prediction(rate=rate, share=rate / roof, limit=limit)
