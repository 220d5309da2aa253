"""Shipped kernels behind the host code of the Triton ones: ``kernel[grid](...)`` runs what was built ahead of time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hybridcomm.kernels.cubins.errors import KernelError
from hybridcomm.kernels.cubins.load import find
from hybridcomm.kernels.device import DeviceKernel

if TYPE_CHECKING:
    from hybridcomm.kernels.cubins.driver import Driver
    from hybridcomm.kernels.triton.launch import Family

__all__ = ["Launcher", "Run", "family_of", "on_cuda"]

Run = Callable[[DeviceKernel, int, Mapping[str, Any]], None]
"""Launches so many programs of a kernel; arguments by name, arrays as torch tensors or None."""

_TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "uint8": "*u8", "int64": "*i64"}


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Stands in for a ``triton.jit`` function: of its shipped instances the one that types and constants choose is run.

    ``otherwise``: where none is shipped for a call, leave it to the function itself and Triton's compiler.
    """

    function: Any
    kernels: Sequence[DeviceKernel]
    run: Run
    otherwise: bool = True

    @property
    def arg_names(self) -> Sequence[str]:
        names: Sequence[str] = self.function.arg_names
        return names

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int], *positional: Any, **named: Any) -> None:
        given = dict(zip(self.arg_names, positional, strict=False)) | named
        kernel = self.chosen(given)
        if kernel is not None:
            self.run(kernel, grid[0], {argument.name: given[argument.name] for argument in kernel.arguments})
        elif self.otherwise:
            self.function[grid](*positional, **named)
        else:
            raise KernelError(f"{self.function.__name__}: nothing is shipped for this call")

    def chosen(self, given: Mapping[str, Any]) -> DeviceKernel | None:
        """What is shipped for a call's arguments, constants and ``num_warps``; None if nothing is."""
        for names, instances in self._instances.items():
            key = given.get("num_warps", 1), *(int(given[name]) for name in names)
            for kernel in instances.get(key, ()):
                if all(_fits(each.type, each.aligned, given[each.name]) for each in kernel.arguments):
                    return kernel
        return None

    @functools.cached_property
    def _instances(self) -> Mapping[tuple[str, ...], Mapping[tuple[int, ...], Sequence[DeviceKernel]]]:
        """What is shipped of the function, by names of its constants, then by ``num_warps`` and their values."""
        found: dict[tuple[str, ...], dict[tuple[int, ...], list[DeviceKernel]]] = {}
        for kernel in self.kernels:
            if kernel.function == self.function.__name__:
                names, values = zip(*kernel.constants, strict=True) if kernel.constants else ((), ())
                found.setdefault(names, {}).setdefault((kernel.num_warps, *values), []).append(kernel)
        return found


def _fits(kind: str, aligned: bool, value: Any) -> bool:
    """Whether an argument is what a kernel was compiled for."""
    if kind.startswith("*"):
        typed = _TYPES.get(str(value.dtype).removeprefix("torch.")) == kind
        return typed and (not aligned or value.data_ptr() % 16 == 0)
    return not aligned or value % 16 == 0


def family_of(family: Family, kernels: Sequence[DeviceKernel], run: Run, *, otherwise: bool = True) -> Family:
    """The family with launchers in place of its functions."""
    from hybridcomm.kernels.triton.withdraw import KERNELS

    def made(function: Any) -> Launcher:
        return Launcher(function=function, kernels=(*kernels, *KERNELS), run=run, otherwise=otherwise)

    return replace(
        family,
        encode=made(family.encode),
        reencode=made(family.reencode),
        decode=made(family.decode),
        withdraw=made(family.withdraw),
    )


def on_cuda(driver: Driver, arch: int, stream: Callable[[], int]) -> Run:
    """Launches on a device of compute capability ``arch`` (80: 8.0), on what ``stream`` says when asked.

    An image is read, unpacked and verified when it is first launched.
    """
    image = functools.cache(lambda name: find(name, arch))

    def run(kernel: DeviceKernel, programs: int, arguments: Mapping[str, Any]) -> None:
        values = {name: _address(value) for name, value in arguments.items()}
        driver.launch(image(kernel.name), programs, stream(), **values)

    return run


def _address(value: Any) -> int | float:
    if value is None:
        return 0
    address: int | float = value.data_ptr() if hasattr(value, "data_ptr") else value
    return address
