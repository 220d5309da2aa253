"""Builds the C++ programs of tests/csrc, with sanitizers, in build folders of their own."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["CSRC", "ROOT", "build", "configure", "copy_sources", "run_program"]

ROOT = Path(__file__).resolve().parents[1]
CSRC = ("hybridcomm/csrc", "kernels/host", "tests/csrc")
_CMAKE = shutil.which("cmake") or "cmake"


def configure(
    folder: Path, *options: str, source: Path = ROOT, sanitize: str = "", compiler: str = ""
) -> None:
    """Prepares a build in ``folder`` under the sanitizers, such as ``address,undefined``."""
    import pybind11

    command = [
        _CMAKE,
        f"-S{source}",
        f"-B{folder}",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        f"-DHYBRIDCOMM_SANITIZE={sanitize}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *options,
    ]
    if compiler:
        command.append(f"-DCMAKE_CXX_COMPILER={compiler}")
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def build(folder: Path, *targets: str) -> None:
    """Builds targets of a configured folder; raises with the compiler's words."""
    command = [_CMAKE, "--build", str(folder), "-j2", "--target", *targets]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def copy_sources(folder: Path) -> Path:
    """A copy of what the programs are built from, to plant bugs in."""
    for name in CSRC:
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    return folder


def run_program(program: Path, *, limit: float = 300.0) -> tuple[int, str]:
    """(exit code, what it printed); a thread sanitizer stops at its first finding."""
    env = {**os.environ, "TSAN_OPTIONS": f"halt_on_error=1 suppressions={ROOT / 'tests/csrc/tsan.supp'}"}
    # Older thread sanitizers know no layout with much address randomisation.
    shell = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    done = subprocess.run(
        [*shell, str(program)], env=env, check=False, capture_output=True, text=True, timeout=limit
    )
    return done.returncode, done.stdout + done.stderr
