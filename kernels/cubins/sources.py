"""From which files a kernel is built, and their hashes; reads text only.

Followed are imports (``.py``) and includes (``.cu``, ``.cuh``) from a kernel's own file on, inside
``kernels/triton/jit`` and ``kernels/cuda``, where device code lies. Of the rest of the library device code takes only
constants: the header's layout, whose file is always one of the sources, and what a codec's spec says, which stands in
the ``DeviceKernel`` itself. What declares and launches a kernel is none of its sources.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from hybridcomm.kernels.cubins.errors import BuildError
from hybridcomm.kernels.cubins.registry import ROOT

__all__ = ["files", "hashes"]

_FORMAT = "payload.py"
_PACKAGE = "hybridcomm.kernels."


def _imports(path: Path, root: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.startswith(_PACKAGE + "triton.jit."):
                found = root.joinpath(*name.removeprefix(_PACKAGE).split(".")).with_suffix(".py")
                if found.is_file():
                    yield found


def _includes(path: Path) -> Iterator[Path]:
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
        yield (path.parent / name).resolve()


def files(source: str, root: Path = ROOT) -> tuple[str, ...]:
    """Paths below ``root`` of all that the kernels of ``source`` are built from.

    Raises:
        BuildError: one of them is not there.
    """
    root = root.resolve()
    waiting = [root / _FORMAT, root / source]
    found: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        if not path.is_file():
            raise BuildError(
                f"{path.relative_to(root)}: kernels of {source} are built from it, but it is not there"
            )
        found.add(path)
        waiting.extend(_imports(path, root) if path.suffix == ".py" else _includes(path))
    return tuple(sorted(path.relative_to(root).as_posix() for path in found))


def hashes(source: str, root: Path = ROOT) -> dict[str, str]:
    """sha256 of each of ``files``."""
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in files(source, root)}
