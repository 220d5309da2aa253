"""Which device kernels there are: every module below ``kernels/triton`` and ``kernels/cuda`` that has ``KERNELS``.

``declaring`` reads the sources only; ``gather`` imports the modules, which needs neither Triton nor torch.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

from hybridcomm.kernels.cubins.errors import BuildError
from hybridcomm.kernels.device import DeviceKernel

__all__ = ["ROOT", "declaring", "gather"]

ROOT = Path(__file__).parents[1]  # kernels/, or hybridcomm/kernels/ where installed
_PLACES = ("triton", "cuda")


def _declares(path: Path) -> bool:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "KERNELS" for target in targets):
            return True
    return False


def declaring(root: Path = ROOT) -> tuple[str, ...]:
    """Modules that assign ``KERNELS``, named from ``hybridcomm.kernels`` on (``triton.topk``), sorted."""
    paths = [path for place in _PLACES for path in (root / place).rglob("*.py")]
    return tuple(
        sorted(".".join(path.relative_to(root).with_suffix("").parts) for path in paths if _declares(path))
    )


def gather() -> dict[str, tuple[DeviceKernel, ...]]:
    """Module -> its kernels, of all modules that declare some.

    Raises:
        BuildError: two kernels of one name, or ``KERNELS`` that is no tuple of ``DeviceKernel``.
    """
    found: dict[str, tuple[DeviceKernel, ...]] = {}
    seen: dict[str, str] = {}
    for module in declaring():
        kernels = importlib.import_module(f"hybridcomm.kernels.{module}").KERNELS
        if not isinstance(kernels, tuple) or not all(isinstance(kernel, DeviceKernel) for kernel in kernels):
            raise BuildError(f"{module}.KERNELS: a tuple of DeviceKernel wanted")
        for kernel in kernels:
            if kernel.name in seen:
                raise BuildError(f"{kernel.name}: declared by both {seen[kernel.name]} and {module}")
            seen[kernel.name] = module
        found[module] = kernels
    return found
