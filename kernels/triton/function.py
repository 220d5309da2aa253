"""The functions of ``jit/`` by name: what host code launches. Triton is loaded when its compiler is to run, not before.

A launcher of what is shipped (`cubins.launcher.Launcher`) stands in for them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hybridcomm.kernels.cubins.errors import KernelError

__all__ = ["LAUNCH", "Function"]

LAUNCH: Mapping[str, Any] = MappingProxyType({"enable_fp_fusion": False})
"""For Triton's compiler: a fused multiply-add would round once, the oracle rounds twice."""


@dataclass(frozen=True, kw_only=True)
class Function:
    """A kernel of ``jit/``: ``function[grid](name=value, ...)`` compiles and runs it.

    ``module``: its file there; ``arguments``: in order, without the constants.
    """

    module: str
    name: str
    arguments: tuple[str, ...]

    @property
    def source(self) -> str:
        """As a `DeviceKernel` names it."""
        return f"triton/jit/{self.module}.py"

    def load(self) -> Any:
        """Triton's function.

        Raises:
            KernelError: Triton is not installed.
        """
        try:
            module = importlib.import_module(f"hybridcomm.kernels.triton.jit.{self.module}")
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise KernelError(
                f"{self.name} of {self.source}: nothing is shipped for this call, and triton, which could compile it, "
                "is not installed: pip install triton, or use the default settings in regions of a multiple of 16"
            ) from None
        return getattr(module, self.name)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        launched: Callable[..., None] = self.load()[grid]
        return launched
