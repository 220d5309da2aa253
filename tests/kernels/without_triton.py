"""Shipped kernels launched where Triton cannot be imported; run by test_triton.py in a process of its own."""

# ruff: noqa: E402 (what is imported comes behind what forbids it)

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from typing import Any

import pytest


class _Refuse:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
        return None


assert "triton" not in sys.modules
sys.meta_path.insert(0, _Refuse())

import torch

from hybridcomm.kernels import parse
from hybridcomm.kernels.cubins import KernelError, registry
from hybridcomm.kernels.device_codec import device_codec, jit_codec
from hybridcomm.selftest.kernels import SPECS, Vector, differences
from tests.hybridcomm.selftest.test_selftest_kernels import Cleared
from tests.kernels.cubins.test_driver import (  # noqa: F401 (collected here too)
    test_encoding_and_decoding_through_the_driver_equal_the_oracle,
)
from tests.kernels.interpreted_bucket import check_pack_and_unpack, tensors
from tests.kernels.ptx_run import PtxRun
from tests.kernels.test_bucket_ptx import shipped

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _triton_is_not_there() -> None:
    with pytest.raises(ModuleNotFoundError):
        import triton  # noqa: F401


def test_every_declaration_is_there() -> None:
    assert {place.partition(".")[0] for place in registry.gather()} == {"cuda", "triton"}


@pytest.mark.parametrize("text", SPECS)
def test_every_codec_encodes_decodes_and_encodes_sums(text: str) -> None:
    codec = device_codec(parse(text), Cleared(arch=90), jit=False)
    vector = Vector(kind="normal", numel=2048 + 48, grad="float32", rest="float32")
    assert differences(codec, vector, CPU) == []


def test_buckets_are_packed() -> None:
    run = PtxRun(arch=90, beside=tensors())
    check_pack_and_unpack(list(run.beside), torch.float32, 0, 1.0, shipped(run))
    assert len(run.launches) == 2


@pytest.mark.parametrize("text", ["int8", "gtop1:0.01"])
def test_what_is_not_shipped_says_what_is_missing(text: str) -> None:
    spec, grad = parse(text), torch.ones(48)
    payload = torch.zeros(spec.nbytes(48), dtype=torch.uint8)
    for codec in (device_codec(spec, PtxRun(arch=90)), jit_codec(spec)):
        with pytest.raises(KernelError, match="pip install triton"):
            codec.encode(grad, torch.ones(48), torch.ones(48), payload, decay=0.9)
    strict = device_codec(spec, PtxRun(arch=90), jit=False)
    with pytest.raises(KernelError, match="nothing is shipped for this call"):
        strict.encode(grad, torch.ones(48), torch.ones(48), payload, decay=0.9)
