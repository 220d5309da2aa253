"""Running a shipped kernel's PTX as its launcher would, on the CPU: arguments by name, figures per element."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from hybridcomm.kernels.cubins import find_ptx
from hybridcomm.kernels.device import DeviceKernel
from tests.ptx import Counters, Kernel, Memory
from tests.ptx.launch import LIMIT

__all__ = ["Executable", "Figures", "executable"]


@dataclass(frozen=True, kw_only=True)
class Executable:
    """A kernel for one architecture, parsed."""

    kernel: DeviceKernel
    arch: int
    program: Kernel
    shared: int
    threads: int
    limit: int = LIMIT

    def launch(self, memory: Memory, elements: int, /, **arguments: int | float) -> Counters:
        """One launch over so many ``elements``: pointers are addresses in ``memory``.

        Raises:
            PtxError: any finding.
            TypeError: an argument is missing or too many.
        """
        names = [argument.name for argument in self.kernel.arguments]
        if set(names) != set(arguments):
            raise TypeError(f"{self.kernel.name} takes {names}, got {sorted(arguments)}")
        for argument in self.kernel.arguments:
            value = arguments[argument.name]
            if argument.aligned and isinstance(value, int) and value % 16:
                raise TypeError(f"{self.kernel.name}: {argument.name} is promised to be a multiple of 16")
        return self.program.launch(
            memory,
            [arguments[name] for name in names],
            grid=self.kernel.grid(elements),
            block=self.threads,
            shared=self.shared,
            limit=self.limit,
        )


@functools.cache
def executable(kernel: DeviceKernel, arch: int) -> Executable:
    """The PTX that the cubin for ``arch`` was assembled from, so no compiler is needed; parsed once per process."""
    image = find_ptx(kernel.name, arch)
    return Executable(
        kernel=kernel,
        arch=arch,
        program=Kernel(image.data.removesuffix(b"\0").decode(), image.symbol),
        shared=image.dynamic_shared,
        threads=image.threads,
    )


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Per element: bytes between device memory and caches that forget nothing while the kernel runs, in whole 32-byte
    sectors; bytes that threads asked for (an atomic for two accesses); instructions of PTX that threads executed;
    barriers of CTAs."""

    moved: float
    nbytes: float
    instructions: float
    barriers: float

    @classmethod
    def of(cls, numel: int, *launches: Counters) -> Figures:
        traffic = [
            launch.traffic[key] for launch in launches for key in launch.traffic if key.endswith(".global")
        ]
        atomics = [launch.traffic["atom.global"] for launch in launches if "atom.global" in launch.traffic]
        both = traffic + atomics
        return cls(
            moved=sum(launch.moved for launch in launches) / numel,
            nbytes=sum(t.nbytes for t in both) / numel,
            instructions=sum(launch.instructions for launch in launches) / numel,
            barriers=sum(launch.barriers for launch in launches) / numel,
        )

    def __str__(self) -> str:
        return (
            f"{self.moved:.3f} bytes moved ({self.nbytes:.3f} asked for), {self.instructions:.1f} instructions per "
            f"element"
        )
