"""Shipped kernels behind the host code of the Triton ones: ``kernel[grid](...)`` runs what was built ahead of time.

Nothing here needs Triton.
"""

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
    from hybridcomm.kernels.triton.family import Family
    from hybridcomm.kernels.triton.function import Function

__all__ = ["Launcher", "Run", "family_of", "on_cuda"]

Run = Callable[[DeviceKernel, int, Mapping[str, Any]], None]
"""Launches so many programs of a kernel; arguments by name, arrays as torch tensors or None."""

_TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "uint8": "*u8", "int64": "*i64"}


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Stands in for a `triton.function.Function`: of its shipped instances the one that types and constants choose is
    run.

    ``otherwise``: where none is shipped for a call, leave it to the function itself and Triton's compiler.
    """

    function: Function
    kernels: Sequence[DeviceKernel]
    run: Run
    otherwise: bool = True

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int], **given: Any) -> None:
        kernel = self.chosen(given)
        if kernel is not None:
            self.run(kernel, grid[0], {name: given[name] for name in self.function.arguments})
        elif self.otherwise:
            self.function[grid](**given)
        else:
            raise KernelError(f"{self.function.name}: nothing is shipped for this call")

    def chosen(self, given: Mapping[str, Any]) -> DeviceKernel | None:
        """What is shipped for a call's arguments, constants and ``num_warps``; None if nothing is."""
        constants, instances = self._instances
        arrays = (given[name] for name in self.function.arguments if hasattr(given[name], "dtype"))
        key = (
            given.get("num_warps", 1),
            *(int(given[name]) for name in constants),
            *(_kind(array.dtype) for array in arrays),
        )
        kernel = instances.get(key)
        return kernel if kernel is not None and _aligned(kernel, given) else None

    @functools.cached_property
    def _instances(self) -> tuple[tuple[str, ...], Mapping[tuple[Any, ...], DeviceKernel]]:
        """The names of the function's constants; what is shipped of it, by ``num_warps``, their values, and types."""
        mine = [kernel for kernel in self.kernels if kernel.function == self.function.name]
        names = tuple(name for name, _ in mine[0].constants) if mine else ()
        return names, {
            (
                kernel.num_warps,
                *(dict(kernel.constants)[name] for name in names),
                *(each.type for each in kernel.arguments if each.type.startswith("*")),
            ): kernel
            for kernel in mine
        }


@functools.cache
def _kind(dtype: Any) -> str:
    """A torch type as kernels have it."""
    return _TYPES.get(str(dtype).removeprefix("torch."), "")


def _aligned(kernel: DeviceKernel, given: Mapping[str, Any]) -> bool:
    """Whether all arguments are multiples of 16 that the kernel was promised to be."""
    return all(_address(given[each.name]) % 16 == 0 for each in kernel.arguments if each.aligned)


def family_of(family: Family, kernels: Sequence[DeviceKernel], run: Run, *, otherwise: bool = True) -> Family:
    """The family with launchers in place of its functions."""
    from hybridcomm.kernels.triton.withdraw import KERNELS

    def made(function: Function) -> Launcher:
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
