"""Builds the simulation and the programs that run on it, and reads what they say."""

from __future__ import annotations

import atexit
import fcntl
import functools
import hashlib
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
    """The simulation, built once for all test processes that have these sources; or what HYBRIDCOMM_SIM names."""
    if os.environ.get("HYBRIDCOMM_SIM"):
        return Path(os.environ["HYBRIDCOMM_SIM"])
    sources = sorted((HERE / "sim").iterdir()) + sorted(GPU.glob("gpu_*_abi.h"))
    digest = hashlib.blake2b(b"".join(source.read_bytes() for source in sources), digest_size=8).hexdigest()
    cache = ROOT / "build" / "sim"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes while another builds it, waits for that
        made = cache / digest / "libsim.so"
        if not made.exists():
            for old in cache.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                built = _built(Path(folder))
                made.parent.mkdir()
                built.rename(made)
    return made


def _built(folder: Path) -> Path:
    sim = HERE / "sim"
    options = ("-fPIC", "-pthread", "-O1", f"-I{GPU}", f"-I{sim}")

    def compiled(source: Path) -> Path:
        return compile_cpp(folder / f"{source.stem}.o", *options, "-c", source)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sorted(sim.glob("*.cpp"))))
    return compile_cpp(folder / "libsim.so", "-shared", "-pthread", *objects)


@functools.cache
def _folder() -> Path:
    """For programs; it goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="hybridcomm-sim-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def build(program: str) -> Path:
    """``program``.cpp beside the simulation; once in a process."""
    sources = [
        HERE / f"{program}.cpp",
        GPU / "gpu_library.cpp",
        GPU / "gpu_tables.cpp",
        ROOT / "hybridcomm/csrc/common.cpp",
    ]
    return compile_cpp(_folder() / program, *sources, f"-I{GPU}", "-ldl", "-pthread")


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
