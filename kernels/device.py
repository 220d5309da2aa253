"""A device kernel as it is shipped, as data: a function with types, constants and launch shape fixed.

Who makes them: the modules of ``triton/`` and ``cuda/``, one tuple ``KERNELS`` each. Who reads them: the builder of
cubins, the gate, the executor of PTX, the roofline page, the launcher. Nothing of that imports triton or torch.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Argument", "Budget", "DeviceKernel"]


@dataclass(frozen=True, kw_only=True)
class Argument:
    """A run-time parameter. ``type`` is Triton's: ``*fp32``, ``*u8``, ``i32``, ``i64``, ``fp32``, ...

    ``aligned``: the caller promises a multiple of 16 (pointers: bytes), without which loads are scalar.
    """

    name: str
    type: str
    aligned: bool = True


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one element may cost.

    ``nbytes``: of device memory read and written per element of the gradient (or shard), in whole sectors of 32 bytes,
    each once; ``instructions``: executed by threads, per element, warm; ``cold``: likewise where a kernel starts from a
    worse guess, or the code of all cases of which each program runs one; ``registers``: per thread.
    """

    nbytes: float
    instructions: float
    registers: int
    cold: float | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceKernel:
    """One entry point with everything about it that is known before it is launched.

    ``source``: file in this package that defines ``function``; a ``.py`` is Triton, a ``.cu`` is CUDA C++.
    ``constants``: Triton's constexpr arguments (or a CUDA template's, for the record). ``elements``: gradient (or
    shard) elements per program, so that the grid is ceil(numel / elements). ``codec``: the spec's text whose payload it
    reads or writes, empty where there is none. ``archs``: compute capabilities it is built for. ``touched``: arrays of
    which it reads or writes a few elements here and there; what it takes of the others, it streams. ``tail``: its one
    program takes what whole programs leave of a region, so nobody asks how well it keeps a device busy. ``trips``: how
    often each of its loops runs, at most, with as many payloads as its budget is for; None: that hangs on the data.
    """

    name: str
    source: str
    function: str
    arguments: tuple[Argument, ...]
    constants: tuple[tuple[str, int], ...]
    num_warps: int
    elements: int
    budget: Budget
    codec: str = ""
    archs: tuple[int, ...] = (80, 90, 100)
    touched: tuple[str, ...] = ()
    tail: bool = False
    trips: int | None = None

    def grid(self, numel: int) -> int:
        """Programs for ``numel`` elements."""
        return -(-numel // self.elements)
