"""NVIDIA's programs that come with Triton's wheel: ptxas and nvdisasm. Found without importing triton."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path

from hybridcomm.kernels.cubins.errors import BuildError

__all__ = ["assemble", "disassemble", "find", "headers", "ptxas_version"]

CUDA = 12  # cubins of CUDA 13's ptxas are refused by CUDA 12 drivers; those of 12.x run on both


def find(name: str) -> Path | None:
    """The program ``name`` of the installed Triton wheel."""
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / "backends" / "nvidia" / "bin" / name
        if path.is_file():
            return path
    return None


def _tool(name: str) -> Path:
    path = find(name)
    if path is None:
        raise BuildError(f"{name} is missing: it comes with Triton's wheel; pip install 'hybridcomm[triton]'")
    return path


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{Path(command[0]).name}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def ptxas_version() -> str:
    """The version of ptxas, such as ``12.9.86``.

    Raises:
        BuildError: it is missing, or not of CUDA 12.
    """
    told = re.search(r"\bV(\d+)(\.\d+\.\d+)", _run(_tool("ptxas"), "--version"))
    if told is None or int(told[1]) != CUDA:
        raise BuildError(f"ptxas of CUDA {CUDA} wanted, got {told[0] if told else 'no version'}")
    return told[1] + told[2]


def assemble(ptx: str, arch: int) -> bytes:
    """PTX to a cubin for ``arch``; no multiply and add is fused.

    Raises:
        BuildError: what ptxas says.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx, encoding="utf-8")
        _run(_tool("ptxas"), "--fmad=false", f"--gpu-name=sm_{arch}", source, "-o", out)
        return out.read_bytes()


def disassemble(cubin: bytes) -> str:
    """SASS as ``nvdisasm -c`` prints it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run(_tool("nvdisasm"), "-c", file.name)


def headers() -> list[Path]:
    """The folders with CUDA's headers (``cuda_fp16.h``) that come with Triton's wheel."""
    found = find("ptxas")
    folder = found.parents[1] / "include" if found is not None else None
    return [folder] if folder is not None and folder.is_dir() else []
