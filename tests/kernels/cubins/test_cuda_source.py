"""CUDA C++ by NVRTC; PTX of one kernel of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridcomm.kernels.cubins import BuildError, cuda_source, elf, ptx, tools
from hybridcomm.kernels.device import Argument, Budget, DeviceKernel

needs_nvrtc = pytest.mark.skipif(
    cuda_source.find() is None or tools.find("ptxas") is None,
    reason="NVRTC is not installed: CUDA C++ is not compiled here",
)
_SOURCE = """#include "half.cuh"
#include <stdint.h>
template <int kRows> __device__ void scale(float* x, float by) {
  __shared__ float rows[kRows];
  rows[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = __fmul_rn(rows[kRows - 1 - threadIdx.x], by);
}
extern "C" __global__ void __launch_bounds__(64) halve(float* x, uint64_t n) { scale<64>(x, kHalf); }
extern "C" __global__ void __launch_bounds__(32) fuse(float* x) { x[0] = x[1] * x[2] + x[3]; }
"""
KERNEL = DeviceKernel(
    name="halve",
    source="cuda/halve.cu",
    function="halve",
    arguments=(Argument(name="x", type="*fp32"), Argument(name="n", type="u64")),
    constants=(),
    num_warps=2,
    elements=64,
    budget=Budget(nbytes=8, instructions=32, registers=32),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "halve.cu").write_text(_SOURCE)
    (tmp_path / "cuda" / "half.cuh").write_text("constexpr float kHalf = 0.5f;\n")
    return tmp_path


@needs_nvrtc
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_one_kernel_of_a_file(root: Path, arch: int) -> None:
    text = cuda_source.compile_ptx(KERNEL, arch, root)
    assert text == cuda_source.compile_ptx(KERNEL, arch, root)
    assert (ptx.read(text).version, ptx.read(text).target) == (ptx.ISA[arch], f"sm_{arch}")
    assert "fuse" not in text
    told = elf.read(tools.assemble(text, arch))
    assert (told.symbol, told.threads, told.parameters) == ("halve", 64, ((0, 8), (8, 8)))
    assert told.shared >= 64 * 4


@needs_nvrtc
def test_errors_are_the_compilers(root: Path) -> None:
    (root / "cuda" / "half.cuh").write_text("constexpr float kThird = 0.5f;\n")
    with pytest.raises(BuildError, match=r"halve\.cu.*kHalf"):
        cuda_source.compile_ptx(KERNEL, 80, root)


_TEXT = """.version 8.8
.target sm_90a
.address_size 64
.shared .align 4 .b8 rows_of_a[256];
.shared .align 4 .b8 rows_of_b[128];
.visible .entry a(
	.param .u64 a_param_0
)
{
	mov.u32 %r1, rows_of_a;
	ret;
}
.visible .entry b()
{
	ret;

}
"""


def test_what_other_kernels_need_is_left_out() -> None:
    text = ptx.only(_TEXT, "a")
    assert "rows_of_a[256]" in text
    assert "rows_of_b" not in text
    assert ptx.read(text).parameters == (8,)
    assert "rows" not in ptx.only(_TEXT, "b")
    with pytest.raises(BuildError, match="no kernel c"):
        ptx.only(_TEXT, "c")
    with pytest.raises(BuildError, match="got 2"):
        ptx.read(_TEXT)


def test_versions_and_targets_are_lowered() -> None:
    assert ptx.read(ptx.lower(ptx.only(_TEXT, "a"), 90)).version == "8.0"
    assert ptx.read(ptx.lower(ptx.only(_TEXT, "a"), 90)).target == "sm_90"
    assert ptx.stripped("a; // why\n\n\n\tb;\n") == "a;\n\tb;\n"


def test_parameters_are_plain() -> None:
    with pytest.raises(BuildError, match="a number or a pointer wanted"):
        ptx.read(
            ".version 8.0\n.target sm_80\n.visible .entry k(\n.param .align 8 .b8 k_param_0[16]\n)\n{\n}\n"
        )
