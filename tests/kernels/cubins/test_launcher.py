"""Which calls are served by what was built ahead of time, and who serves the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hybridcomm.kernels.cubins import KernelError
from hybridcomm.kernels.cubins.launcher import Launcher
from hybridcomm.kernels.device import Argument, Budget, DeviceKernel


def kernel(grad: str, half: int) -> DeviceKernel:
    return DeviceKernel(
        name=f"double_{grad}_{half}",
        source="triton/double.py",
        function="double_kernel",
        arguments=(
            Argument(name="grad", type=f"*{grad}"),
            Argument(name="numel", type="i64"),
            Argument(name="weight", type="fp32", aligned=False),
        ),
        constants=(("HALF", half),),
        num_warps=2,
        elements=64,
        budget=Budget(nbytes=8, instructions=4, registers=32),
    )


class Jit:
    """As a function of Triton's is named and called; notes calls."""

    name = "double_kernel"
    arguments = ("grad", "numel", "weight")

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda **given: self.calls.append((grid, given))


KERNELS = (kernel("fp32", 0), kernel("bf16", 0), kernel("fp32", 1))
GRAD = torch.zeros(64)


def launched(*, otherwise: bool = True) -> tuple[Launcher, list[tuple[str, int, dict[str, Any]]], Jit]:
    runs: list[tuple[str, int, dict[str, Any]]] = []
    jit = Jit()
    launcher = Launcher(
        function=jit,
        kernels=KERNELS,
        run=lambda chosen, programs, arguments: runs.append((chosen.name, programs, dict(arguments))),
        otherwise=otherwise,
    )
    return launcher, runs, jit


@pytest.mark.parametrize(
    ("grad", "half", "name"),
    [(GRAD, False, "double_fp32_0"), (GRAD.bfloat16(), 0, "double_bf16_0"), (GRAD, True, "double_fp32_1")],
)
def test_types_and_constants_choose(grad: torch.Tensor, half: int, name: str) -> None:
    launcher, runs, jit = launched()
    launcher[7,](grad=grad, numel=64, weight=0.5, HALF=half, num_warps=2, enable_fp_fusion=False)
    ((chosen, programs, arguments),) = runs
    assert (chosen, programs) == (name, 7)
    assert arguments["grad"] is grad
    assert (arguments["numel"], arguments["weight"]) == (64, 0.5)
    assert not jit.calls


@pytest.mark.parametrize(
    ("grad", "numel", "warps"),
    [(GRAD.half(), 64, 2), (GRAD, 63, 2), (GRAD[1:], 64, 2), (GRAD, 64, 1)],
    ids=["type", "multiple", "alignment", "warps"],
)
def test_other_calls_go_to_the_compiler_or_are_refused(grad: torch.Tensor, numel: int, warps: int) -> None:
    launcher, runs, jit = launched()
    given = {"grad": grad, "numel": numel, "weight": 0.5, "HALF": 0, "num_warps": warps}
    launcher[7,](**given)
    assert not runs
    assert jit.calls == [((7,), given)]
    strict, runs, jit = launched(otherwise=False)
    with pytest.raises(KernelError, match="double_kernel: nothing is shipped"):
        strict[7,](**given)
    assert not runs + jit.calls
