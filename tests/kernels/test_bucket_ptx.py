"""Packing into and out of buckets, executed from the shipped PTX, against torch on the host, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels' host code is not there")

from hybridcomm.kernels.cubins.launcher import Launcher
from hybridcomm.kernels.triton import bucket
from tests.kernels.interpreted_bucket import FILL, TYPES, as_bits, offsets, tensors
from tests.kernels.ptx_run import PtxRun
from tests.ptx.conformance import Figures


@pytest.fixture(params=(80, 90), ids=lambda arch: f"sm_{arch}")
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PtxRun:
    run = PtxRun(arch=request.param)
    launcher = Launcher(function=bucket.bucket_kernel, kernels=bucket.KERNELS, run=run, otherwise=False)
    monkeypatch.setattr(bucket, "bucket_kernel", launcher)
    return run


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_pack_and_unpack_equal_torch(device: PtxRun, dtype: torch.dtype) -> None:
    scale = float(np.float32(1 / 3))
    device.beside = made = tensors()
    places = offsets(made, 3)
    where = bucket.layout(made, places)
    got = torch.full((where.end + 5,), FILL).to(dtype)
    want = got.clone()
    for tensor, place in zip(made, places, strict=True):
        want[place : place + tensor.numel()] = (tensor.float() * np.float32(scale)).reshape(-1).to(dtype)
    bucket.pack(where, got, scale)
    assert as_bits(got) == as_bits(want)
    expected = [
        (want[p : p + t.numel()].float() * np.float32(scale)).to(t.dtype).reshape(t.shape)
        for t, p in zip(made, places, strict=True)
    ]
    bucket.unpack(where, got, scale)
    for tensor, wanted in zip(made, expected, strict=True):
        assert as_bits(tensor) == as_bits(wanted)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_budgets_hold(device: PtxRun, dtype: torch.dtype) -> None:
    device.beside = made = [torch.ones(8 * bucket.CHUNK)]
    where, got = bucket.layout(made, [0]), torch.zeros(8 * bucket.CHUNK, dtype=dtype)
    bucket.pack(where, got)
    bucket.unpack(where, got)
    assert len(device.launches) == 2
    for kernel, elements, counters in device.launches:
        figures = Figures.of(elements, counters)
        print(f"{kernel.name}, sm_{device.arch}: {figures}")
        assert figures.moved <= kernel.budget.nbytes
        assert figures.instructions <= 20  # of the one case of six that a program runs
