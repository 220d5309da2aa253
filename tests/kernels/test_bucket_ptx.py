"""Packing into and out of buckets, executed from the shipped PTX, against torch on the host, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybridcomm.kernels.cubins.launcher import Launcher
from hybridcomm.kernels.triton import bucket
from tests.kernels.executed import complaints, of_bucket
from tests.kernels.interpreted_bucket import TYPES, check_pack_and_unpack, tensors
from tests.kernels.ptx_run import PtxRun


@pytest.fixture(params=(80, 90), ids=lambda arch: f"sm_{arch}")
def device(request: pytest.FixtureRequest) -> PtxRun:
    return PtxRun(arch=request.param)


def shipped(run: PtxRun) -> Launcher:
    return Launcher(function=bucket.FUNCTION, kernels=bucket.KERNELS, run=run, otherwise=False)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_pack_and_unpack_equal_torch(device: PtxRun, dtype: torch.dtype) -> None:
    device.beside = made = tensors()
    check_pack_and_unpack(made, dtype, 3, float(np.float32(1 / 3)), shipped(device))
    assert len(device.launches) == 2


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_budgets_hold(device: PtxRun, dtype: torch.dtype) -> None:
    launches = list(of_bucket(dtype, device.arch))
    assert len(launches) == 2
    assert not complaints(launches)
