"""From descriptions to PTX: kept by content, typed when a compiler is missing, arguments by name."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybridcomm.kernels.device import Argument, Budget, DeviceKernel
from tests.ptx import Memory, compiled
from tests.ptx.compiled import CompilerMissingError, compile_kernel
from tests.ptx.conformance import Executable, Figures
from tests.ptx.launch import Kernel
from tests.ptx.snippets import entry

CUDA = r"""
extern "C" __global__ void doubled(const float* in, float* out, int numel) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < numel) out[i] = __fadd_rn(in[i], in[i]);
}
"""
DOUBLED = DeviceKernel(
    name="doubled",
    source="cuda/doubled.cu",
    function="doubled",
    arguments=(
        Argument(name="source", type="*fp32"),
        Argument(name="out", type="*fp32"),
        Argument(name="numel", type="i32", aligned=False),
    ),
    constants=(),
    num_warps=2,
    elements=64,
    budget=Budget(nbytes=8, instructions=20, registers=16),
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of its own with one CUDA source."""
    source = tmp_path / "kernels" / DOUBLED.source
    source.parent.mkdir(parents=True)
    source.write_text(CUDA)
    monkeypatch.setattr(compiled, "ROOT", tmp_path)
    monkeypatch.setattr(compiled, "CACHE", tmp_path / "build")
    return tmp_path


def test_cuda_is_compiled_and_kept(root: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    first = compile_kernel(DOUBLED, 80)
    assert ".target sm_80" in first.ptx
    kept = list((root / "build").iterdir())
    assert compile_kernel(DOUBLED, 80) == first
    assert list((root / "build").iterdir()) == kept
    (root / "kernels" / DOUBLED.source).write_text(CUDA + "// changed")
    assert compile_kernel(DOUBLED, 80) == first
    assert len(list((root / "build").iterdir())) == 2
    memory, numel = Memory(), 100
    values = np.random.default_rng(1).standard_normal(numel).astype(np.float32)
    source, out = memory.place(values), memory.reserve(4 * numel)
    program = Kernel(first.ptx, first.entry)
    built = Executable(kernel=DOUBLED, arch=80, program=program, shared=first.shared, threads=first.threads)
    counters = built.launch(memory, numel, source=source, out=out, numel=numel)
    assert memory.read(out, np.float32).tobytes() == (values + values).tobytes()
    assert Figures.of(numel, counters).nbytes == 8


def test_a_missing_compiler_has_its_own_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert root.exists()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(CompilerMissingError, match="nvcc"):
        compile_kernel(DOUBLED, 80)


def test_arguments_go_by_name_and_keep_their_promise() -> None:
    kernel = replace(DOUBLED, arguments=DOUBLED.arguments[:2])
    built = Executable(kernel=kernel, arch=80, program=Kernel(entry("", parameters=2)), shared=0, threads=64)
    memory = Memory()
    address = memory.place(np.zeros(8, np.float32))
    built.launch(memory, 64, source=address, out=address)
    with pytest.raises(TypeError, match="takes"):
        built.launch(memory, 64, source=address)
    with pytest.raises(TypeError, match="multiple of 16"):
        built.launch(memory, 64, source=address, out=address + 4)
