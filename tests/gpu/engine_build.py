"""Builds the GPU engine alone, as a Python module, file by file: what a planted bug changes is compiled anew.

The module takes the place of the installed one's GPU part (`install`). It has a registry of types of its own
(pybind11's), so that both may be loaded.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.native import ROOT

__all__ = ["Build", "install"]

_CSRC, _OWN = ROOT / "hybridcomm/csrc", ROOT / "tests/gpu/engine"
_NAMES = (
    "GpuEngine",
    "GpuWork",
    "GpuMemory",
    "DeviceKind",
    "DeviceOp",
    "DeviceProgram",
    "device_op",
    "device_launch",
)


@dataclass(frozen=True, kw_only=True)
class Build:
    """A copy of the sources in ``folder``, and the objects that were made of it."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Build:
        made = cls(folder=folder)
        made.source.mkdir(parents=True)
        names = [*_CSRC.glob("gpu_*"), *(_CSRC / f"bind_{each}.cpp" for each in ("gpu", "errors"))]
        names += [
            _CSRC / each for each in ("bindings.h", "common.h", "common.cpp", "half_impl.h", "signals.h")
        ]
        for path in [*names, *_OWN.iterdir()]:
            shutil.copy(path, made.source)
        sources = sorted(made.source.glob("*.cpp"), key=lambda path: not path.name.startswith("bind_"))
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(lambda path: made.compile(path, made.object_of(path.name)), sources))
        return made

    @property
    def source(self) -> Path:
        return self.folder / "source"

    def object_of(self, name: str) -> Path:
        return self.folder / f"{name}.o"

    def compile(self, source: Path, target: Path) -> None:
        import pybind11

        includes = [f"-I{self.source}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        options = [
            "-std=c++17",
            "-O0",
            "-fPIC",
            "-pthread",
            "-fvisibility=hidden",
            '-DPYBIND11_BUILD_ABI="_alone"',
        ]
        _run(["c++", *options, *includes, "-c", str(source), "-o", str(target)])

    def link(self, target: Path, **replaced: Path) -> Path:
        """The module; ``replaced``: objects by the stem of their source."""
        objects = [replaced.get(path.stem, self.object_of(path.name)) for path in self.source.glob("*.cpp")]
        _run(["c++", "-shared", "-pthread", *map(str, objects), "-ldl", "-o", str(target)])
        return target

    def planted(self, number: int, name: str, changes: dict[str, str]) -> Path:
        """The module with a bug in one file: each key, which stands there once, becomes its value."""
        text = (self.source / name).read_text()
        for old, new in changes.items():
            if text.count(old) != 1:
                raise ValueError(f"{name} has changed: {text.count(old)} times {old!r}")
            text = text.replace(old, new)
        folder = self.folder / f"{number}"
        folder.mkdir()
        path = folder / name
        path.write_text(text)
        self.compile(path, folder / "object.o")
        return self.link(folder / "_gpu.so", **{path.stem: folder / "object.o"})


def install(module: Path) -> None:
    """From now on this process has its GPU engine from ``module``."""
    from hybridcomm import _C

    spec = importlib.util.spec_from_file_location("_gpu", module)
    if spec is None or spec.loader is None:
        raise ImportError(str(module))
    made: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    for name in _NAMES:
        setattr(_C, name, getattr(made, name))

    def engine(*, host: Any, **options: Any) -> Any:
        return made.GpuEngine(host=None if host is None else made.Host(host.abort, host.listen), **options)

    _C.GpuEngine = engine  # type: ignore[misc, assignment]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
