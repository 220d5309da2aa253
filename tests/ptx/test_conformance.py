"""Shipped PTX behind its description: arguments by name, promises kept, figures per element."""

from __future__ import annotations

import numpy as np
import pytest

from hybridcomm.kernels.cubins import find_ptx
from hybridcomm.kernels.cuda import topk
from hybridcomm.kernels.device import Argument, Budget, DeviceKernel
from tests.ptx import Memory
from tests.ptx.conformance import Executable, Figures, executable
from tests.ptx.launch import Kernel
from tests.ptx.snippets import entry

DOUBLED = DeviceKernel(
    name="doubled",
    source="cuda/doubled.cu",
    function="doubled",
    arguments=(
        Argument(name="source", type="*fp32"),
        Argument(name="out", type="*fp32"),
    ),
    constants=(),
    num_warps=2,
    elements=64,
    budget=Budget(nbytes=8, instructions=20, registers=16),
)


def test_arguments_go_by_name_and_keep_their_promise() -> None:
    built = Executable(kernel=DOUBLED, arch=80, program=Kernel(entry("", parameters=2)), shared=0, threads=64)
    memory = Memory()
    address = memory.place(np.zeros(8, np.float32))
    built.launch(memory, 64, source=address, out=address)
    with pytest.raises(TypeError, match="takes"):
        built.launch(memory, 64, source=address)
    with pytest.raises(TypeError, match="multiple of 16"):
        built.launch(memory, 64, source=address, out=address + 4)


def test_what_is_executed_is_what_is_shipped() -> None:
    kernel = next(kernel for kernel in topk.KERNELS if kernel.name == "topk_withdraw_fp32")
    built, image = executable(kernel, 90), find_ptx(kernel.name, 90)
    assert (built.threads, built.shared) == (image.threads, image.dynamic_shared) == (128, 0)
    memory, numel = Memory(), 4096
    nbytes = topk.SPEC.nbytes(numel)
    payload, residual = memory.place(np.zeros(nbytes, np.uint8)), memory.place(np.zeros(numel, np.float32))
    counters = built.launch(
        memory, numel, e_in=residual, e_out=residual, payload=payload, numel=numel,
        records_at=topk.SPEC.records_offset(numel), checksum=7,
    )  # fmt: skip
    # Nothing is flagged: each thread reads the flag, and none does more.
    assert Figures.of(numel, counters).nbytes == 4 * built.threads * kernel.grid(numel) / numel
