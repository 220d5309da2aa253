"""The shape of the installed package as a folder of links: ``python -m tests.repository.layout DIRECTORY``.

``kernels/`` is installed as ``hybridcomm.kernels``, but does not lie there in the sources. Tools that find
modules by path (mypy, import-linter) are run in such a folder.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

__all__ = ["ROOT", "make_layout"]

ROOT = Path(__file__).resolve().parents[2]
_AS_THEY_ARE = ("model", "train", "benchmarks", "tests", "pyproject.toml")


def make_layout(directory: Path) -> Path:
    """Fills ``directory`` (emptied first) with links to the sources; returns it."""
    shutil.rmtree(directory, ignore_errors=True)
    package = directory / "hybridcomm"
    package.mkdir(parents=True)
    for entry in (ROOT / "hybridcomm").iterdir():
        if entry.name not in ("kernels", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")
    for name in _AS_THEY_ARE:
        (directory / name).symlink_to(ROOT / name)
    return directory


if __name__ == "__main__":
    make_layout(Path(sys.argv[1]).absolute())
