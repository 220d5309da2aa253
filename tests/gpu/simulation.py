"""Builds the simulation and the programs that run on it, and reads what they say."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

from tests.gpu.test_abi import GPU, HERE, ROOT
from tests.gpu.test_loading import compile_cpp

__all__ = ["EAGER", "SEEDS", "build", "outcomes"]

SEEDS = 20  # of one run of a program
EAGER = (0, 60, 97)
"""Percent: how likely something runs as soon as it is enqueued."""


@functools.cache
def build(program: str) -> tuple[Path, Path]:
    """The simulation as a library, and ``program``.cpp; once in a process."""
    folder, sim = Path(tempfile.mkdtemp(prefix="hybridcomm-sim-")), HERE / "sim"
    library = compile_cpp(
        folder / "libsim.so",
        "-shared",
        "-fPIC",
        "-pthread",
        "-O1",
        *sim.glob("*.cpp"),
        f"-I{GPU}",
        f"-I{sim}",
    )
    sources = [
        HERE / f"{program}.cpp",
        GPU / "library.cpp",
        GPU / "tables.cpp",
        ROOT / "hybridcomm/csrc/common.cpp",
    ]
    return library, compile_cpp(folder / program, *sources, f"-I{GPU}", "-ldl", "-pthread")


def outcomes(program: str, bug: str, seed: int, eager: int) -> list[tuple[bool, list[str]]]:
    """Of each of SEEDS seeds from ``seed`` on: whether values were right, and what was reported."""
    library, path = build(program)
    done = subprocess.run(
        [str(path), str(library), bug, str(seed), str(eager)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    found: list[tuple[bool, list[str]]] = []
    for line in done.stdout.splitlines():
        if line.startswith("seed "):
            found.append((line.endswith("right"), []))
        else:
            found[-1][1].append(line.strip())
    if len(found) != SEEDS:
        raise RuntimeError(f"{len(found)} of {SEEDS} seeds ran")
    return found
