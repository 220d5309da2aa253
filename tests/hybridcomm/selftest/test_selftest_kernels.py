"""The self-test of device kernels, with an executor of PTX in place of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from hybridcomm.kernels import parse
from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.kernels.device_codec import DeviceCodec, device_codec
from hybridcomm.selftest import __main__ as command
from hybridcomm.selftest import kernels
from tests.kernels.ptx_run import PtxRun

CPU = torch.device("cpu")


class Cleared(PtxRun):
    """gtopk adds to what is there: to a payload that the host has cleared, to what it made of the residual before."""

    def __call__(self, kernel: DeviceKernel, programs: int, arguments: Mapping[str, Any]) -> None:
        for name in ("payload", "e_out") if kernel.name.startswith("gtopk") else ():
            tensor = arguments.get(name)
            if tensor is not None:
                self.hold(tensor, np.ones(tensor.untyped_storage().nbytes(), np.bool_))
        super().__call__(kernel, programs, arguments)


def nothing(kernel: DeviceKernel, programs: int, arguments: Mapping[str, Any]) -> None:
    """The planted bug."""


def codec(text: str, run: Callable[..., None]) -> DeviceCodec:
    return device_codec(parse(text), run, jit=False)


SHARED = {"powersgd:2": 0, "powersgd:4": 1}
"""Of these, every second vector: ranks differ in how often loops run, which takes long here."""


@pytest.mark.parametrize("text", kernels.SPECS)
def test_all_codecs_are_right(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = list(kernels.vectors(parse(text)))[SHARED.get(text, 0) :: 1 + (text in SHARED)]
    monkeypatch.setattr(kernels, "vectors", lambda _: iter(chosen))
    assert kernels.check(codec(text, Cleared(arch=90)), CPU) == []


@pytest.mark.parametrize("text", ["topk:0.01", "sign1"])
def test_a_kernel_that_does_nothing_is_found(text: str) -> None:
    found = kernels.check(codec(text, nothing), CPU)
    for what in (
        "encode: another payload",
        "encode: another residual",
        "decode_add: another sum",
        "reencode: another",
    ):
        assert any(what in line for line in found), what


def test_a_report_tells_right_from_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Times are made up here; what is called to get them is not."""

    def once(call: Callable[[], object]) -> float:
        call()
        return 0.5

    monkeypatch.setattr(kernels, "_milliseconds", once)
    assert kernels.report([codec("int8", PtxRun(arch=90))], CPU, 4096) == 0
    text = capsys.readouterr().out
    assert "int8/g128: as the oracle, byte for byte" in text
    assert "torch.topk 1 % | 0.500" in text
    assert text.endswith("all codecs are right\n")
    assert kernels.report([codec("int8", nothing)], CPU, 4096) == 1
    assert "WRONG" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_checked_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["kernels"]) == 2
    assert "no CUDA device: nothing was checked" in capsys.readouterr().out
