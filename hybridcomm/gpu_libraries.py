"""Where NCCL's files lie that pip has installed: found by their wheels' records, without importing anything.

The engine takes the first of these that there is:

1. the file that ``HYBRIDCOMM_NCCL`` names
2. the copy that the process has mapped already, torch's as a rule
3. the files of `nccl_files`, in its order
4. ``libnccl.so.2``, as the system's loader finds it

The driver, ``libcuda.so.1``, belongs to the system and is in no wheel.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["NcclFile", "nccl_files", "torch_cuda"]

SONAME = "libnccl.so.2"
WHEELS = {12: "nvidia-nccl-cu12", 13: "nvidia-nccl-cu13"}
"""By CUDA's major version. Both have their file in one place, ``nvidia/nccl/lib``."""


@dataclass(frozen=True, kw_only=True)
class NcclFile:
    """``package`` and ``version``: of the wheel whose record has the file; "" where none has, and ``cuda`` None."""

    path: Path
    package: str = ""
    version: str = ""
    cuda: int | None = None


def torch_cuda() -> int | None:
    """CUDA's major version that torch was built for; None: torch is not imported, or was built without CUDA."""
    version = getattr(getattr(sys.modules.get("torch"), "version", None), "cuda", None)
    major = str(version).partition(".")[0]
    return int(major) if major.isdecimal() else None


def nccl_files() -> tuple[NcclFile, ...]:
    """NCCL's files in this environment, each once, in the order in which they should be tried.

    First those for the CUDA that torch was built with, if torch is imported; then CUDA 12 before 13, since a driver
    for 13 runs both and one for 12 does not; then files that no wheel's record has. Of one kind those of earlier
    entries of ``sys.path`` come first. Two wheels in one folder write the same file, and whichever came last is
    there: it is listed once, by the wheel that stands first.
    """
    ours = torch_cuda()
    majors = sorted(WHEELS, key=lambda major: (major != ours, major))
    found: dict[Path, NcclFile] = {}
    for file in (*(file for major in majors for file in _of_wheel(major)), *_unrecorded()):
        found.setdefault(file.path.resolve(), file)
    return tuple(found.values())


def _of_wheel(major: int) -> Iterator[NcclFile]:
    name = WHEELS[major]
    for wheel in importlib.metadata.distributions(name=name):
        for entry in wheel.files or ():
            if entry.name == SONAME:
                path = Path(str(wheel.locate_file(entry)))
                if path.is_file():
                    yield NcclFile(path=path, package=name, version=wheel.version, cuda=major)


def _unrecorded() -> Iterator[NcclFile]:
    """Where the wheels would have it: what tools other than pip have put there may have no record."""
    try:
        spec = importlib.util.find_spec("nvidia")  # of a top-level package: it is looked for, not imported
    except ValueError:  # one that is loaded already and says nothing of itself
        spec = None
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        path = Path(folder) / "nccl" / "lib" / SONAME
        if path.is_file():
            yield NcclFile(path=path)
