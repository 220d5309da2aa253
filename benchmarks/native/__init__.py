"""Programs without Python that stand beside the library in the tables: the memory's floor, MPI, the engine alone.

Each is built on first use with the compiler at hand, into build/bench. MPI libraries are peers where their
compiler wrapper and launcher are installed (Debian: openmpi-bin libopenmpi-dev, mpich).
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["MPIS", "engine_latency_ms", "floor_ms", "mpi_allreduce_ms", "mpis"]

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_BUILD = _ROOT / "build" / "bench"

MPIS = {
    "Open MPI": ("mpicxx.openmpi", ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe"]),
    "MPICH": ("mpicxx.mpich", ["mpirun.mpich"]),
    "Intel MPI": ("mpicxx.intel", ["mpirun.intel"]),
}
"""Name -> (compiler wrapper, launcher), by the names under which they stand beside each other."""


def mpis() -> list[str]:
    """The MPI libraries that are installed here."""
    return [name for name, (cxx, launch) in MPIS.items() if shutil.which(cxx) and shutil.which(launch[0])]


@functools.cache
def _compiled(source: str, compiler: str) -> Path:
    _BUILD.mkdir(parents=True, exist_ok=True)
    program = _BUILD / f"{Path(source).stem}-{Path(compiler).name}"
    command = [
        compiler,
        "-O3",
        "-march=native",
        "-std=c++17",
        "-pthread",
        str(_HERE / source),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True, timeout=120)
    return program


@functools.cache
def _engine_program() -> Path:
    import pybind11

    folder = _BUILD / "engine"
    configure = ["cmake", f"-S{_ROOT}", f"-B{folder}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    target = ["cmake", "--build", str(folder), "--target", "hybridcomm_engine_latency", "-j2"]
    for command in (configure, target):
        subprocess.run(command, check=True, capture_output=True, timeout=600)
    return folder / "hybridcomm_engine_latency"


def _output(command: Sequence[str], timeout: float = 300) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=timeout).stdout


def floor_ms(ranks: int, sizes: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Bytes -> ms: every byte of ``ranks`` fp32 tensors read once and written once, one thread per core.

    Twice: call upon call, and with each tensor rewritten by its owner before.
    """
    lines = _output([str(_compiled("floor.cpp", "c++")), str(ranks), *map(str, sizes)]).splitlines()
    return {int(nbytes): (float(ms), float(rewritten)) for nbytes, ms, rewritten in map(str.split, lines)}


def mpi_allreduce_ms(name: str, ranks: int, *, nbytes: int, batch: int, rounds: int) -> float:
    """Median ms per call of one of `MPIS`, timed as ours are."""
    compiler, launch = MPIS[name]
    program = str(_compiled("mpi_allreduce.cpp", compiler))
    return float(_output([*launch, "-n", str(ranks), program, str(nbytes), str(batch), str(rounds)]))


def engine_latency_ms(ranks: int, nbytes: int) -> float:
    """Median ms per call in the engine alone, for sizes that one step sums."""
    return float(_output([str(_engine_program()), str(ranks), str(nbytes)]))
