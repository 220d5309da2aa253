"""From a kernel's description to its PTX, ahead of time and without a GPU; kept in ``build/ptx`` by content."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hybridcomm.kernels.device import DeviceKernel

__all__ = ["Compiled", "CompilerMissingError", "compile_kernel"]

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "ptx"


class CompilerMissingError(RuntimeError):
    """What compiles this kernel is not installed here: a test skips, saying so."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """``shared``: bytes of dynamic shared memory that a launch must bring; ``threads``: of a block."""

    ptx: str
    entry: str
    shared: int
    threads: int


def _cached(key: str) -> Compiled | None:
    path = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    return Compiled(**json.loads(path.read_text())) if path.exists() else None


def _keep(key: str, compiled: Compiled) -> Compiled:
    """Whole or not at all: others may look at the same time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(asdict(compiled)))
    draft.replace(path)
    return compiled


def _triton(kernel: DeviceKernel, arch: int) -> Compiled:
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as problem:
        raise CompilerMissingError(f"{kernel.name}: triton is not installed") from problem
    module = importlib.import_module(
        "hybridcomm.kernels." + kernel.source.removesuffix(".py").replace("/", ".")
    )
    function: Any = getattr(module, kernel.function)
    # The function's key covers its source and that of all it calls.
    key = json.dumps([asdict(kernel), arch, triton.__version__, function.cache_key])
    if found := _cached(key):
        return found
    names = list(function.arg_names)
    given = {argument.name: argument for argument in kernel.arguments}
    source = ASTSource(
        fn=function,
        signature={name: given[name].type if name in given else "constexpr" for name in names},
        constexprs=dict(kernel.constants),
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, argument in given.items()
            if argument.aligned and not argument.type.startswith("fp")
        },
    )
    options = {"num_warps": kernel.num_warps, "enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    compiled = Compiled(
        ptx=built.asm["ptx"],
        entry=kernel.function,
        shared=built.metadata.shared,
        threads=32 * kernel.num_warps,
    )
    return _keep(key, compiled)


def _cuda(kernel: DeviceKernel, arch: int) -> Compiled:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CompilerMissingError(f"{kernel.name}: nvcc is not installed")
    source = ROOT / "kernels" / kernel.source
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    texts = [
        path.read_text() for path in sorted(source.parent.glob("*.cu*"))
    ]  # what it includes is among them
    key = json.dumps([kernel.source, arch, version, texts])  # one compilation for all kernels of a file
    command = [nvcc, "--ptx", f"--gpu-architecture=compute_{arch}", "--fmad=false", "--std=c++17"]
    compiled = _cached(key)
    if compiled is None:
        with tempfile.TemporaryDirectory() as folder:  # nvcc does not come back from writing to a pipe
            out = Path(folder) / "kernels.ptx"
            subprocess.run([*command, "-o", str(out), str(source)], capture_output=True, check=True)
            compiled = _keep(key, Compiled(ptx=out.read_text(), entry="", shared=0, threads=0))
    return replace(compiled, entry=kernel.function, threads=32 * kernel.num_warps)


def compile_kernel(kernel: DeviceKernel, arch: int) -> Compiled:
    """PTX of ``kernel`` for compute capability ``arch`` (80, 90, 100).

    Raises:
        CompilerMissingError: neither cached nor to be had here.
    """
    return _triton(kernel, arch) if kernel.source.endswith(".py") else _cuda(kernel, arch)
