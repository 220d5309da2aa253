"""`loader.cpp`, which finds and loads a library as the engine does: built once, run each time in its own process."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.gpu.test_abi import GPU, HERE, ROOT

__all__ = ["Ran", "build_loader", "compile_cpp", "run_loader"]


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What the loader said, by first word."""

    code: int
    said: dict[str, str] = field(default_factory=dict)


def compile_cpp(target: Path, *arguments: str | Path, source: str | None = None) -> Path:
    subprocess.run(
        ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", *map(str, arguments), "-o", str(target)],
        input=source,
        text=True,
        check=True,
        timeout=120,
    )
    return target


def build_loader(folder: Path) -> Path:
    sources = [
        HERE / "loader.cpp",
        GPU / "gpu_library.cpp",
        GPU / "gpu_tables.cpp",
        ROOT / "hybridcomm/csrc/common.cpp",
    ]
    return compile_cpp(folder / "loader", *sources, f"-I{GPU}", "-ldl")


def run_loader(program: Path, *arguments: str | Path, **environment: str | Path) -> Ran:
    """Raises where it did not end by itself, with 0 or 1."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HYBRIDCOMM")}
    done = subprocess.run(
        [str(program), *map(str, arguments)],
        env={**env, **{key: str(value) for key, value in environment.items()}},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"the loader ended with {done.returncode}: {done.stdout}{done.stderr}")
    lines = (line.partition(" ") for line in done.stdout.splitlines())
    return Ran(code=done.returncode, said={first: rest for first, _, rest in lines})
