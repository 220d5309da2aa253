"""Builds the simulation and the programs that run on it, and reads what they say."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.gpu.test_abi import GPU, HERE, ROOT
from tests.gpu.test_loading import compile_cpp

__all__ = ["EAGER", "SEEDS", "outcomes"]

SEEDS = 20  # of one run of a program
EAGER = (0, 60, 97)
"""Percent: how likely something runs as soon as it is enqueued."""


@functools.cache
def library() -> Path:
    """The simulation, in a folder that goes with the process; or what HYBRIDCOMM_SIM names, for its children."""
    if os.environ.get("HYBRIDCOMM_SIM"):
        return Path(os.environ["HYBRIDCOMM_SIM"])
    folder, sim = Path(tempfile.mkdtemp(prefix="hybridcomm-sim-")), HERE / "sim"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    options = ("-fPIC", "-pthread", "-O1", f"-I{GPU}", f"-I{sim}")

    def compiled(source: Path) -> Path:
        return compile_cpp(folder / f"{source.stem}.o", *options, "-c", source)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sorted(sim.glob("*.cpp"))))
    return compile_cpp(folder / "libsim.so", "-shared", "-pthread", *objects)


@functools.cache
def build(program: str) -> Path:
    """``program``.cpp beside the simulation; once in a process."""
    sources = [
        HERE / f"{program}.cpp",
        GPU / "gpu_library.cpp",
        GPU / "gpu_tables.cpp",
        ROOT / "hybridcomm/csrc/common.cpp",
    ]
    return compile_cpp(library().parent / program, *sources, f"-I{GPU}", "-ldl", "-pthread")


def outcomes(program: str, bug: str, seed: int, eager: int) -> list[tuple[bool, list[str]]]:
    """Of each of SEEDS seeds from ``seed`` on: whether values were right, and what was reported."""
    done = subprocess.run(
        [str(build(program)), str(library()), bug, str(seed), str(eager)],
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
