"""The Triton kernels, executed from their shipped PTX behind their own host code, against the oracle, byte for byte."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels' host code is not there")

from hybridcomm.kernels import reference
from hybridcomm.kernels.cubins import find_ptx
from hybridcomm.kernels.cubins.manifest import Build, Entry, Manifest
from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.kernels.triton import records
from tests.kernels import cases
from tests.kernels.cases import DIGEST
from tests.kernels.ptx_run import PtxRun
from tests.kernels.ptx_triton import CODECS, Codec, encoded, inputs, payloads_of, reencoded, wanted
from tests.ptx.conformance import Figures

ARCHS = (80, 90)
"""Of sm_100 the PTX is that of sm_90, see `test_one_text_serves_two_architectures`."""
TYPES = (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "bf16"))
"""Of gradient and residual."""


@pytest.fixture(params=ARCHS, ids=lambda arch: f"sm_{arch}")
def device(request: pytest.FixtureRequest) -> PtxRun:
    return PtxRun(arch=request.param)


over_codecs = pytest.mark.parametrize("codec", CODECS, ids=str)


def sizes(codec: Codec) -> tuple[int, ...]:
    """Whole programs, some and a tail, a tail alone; shipped are multiples of 16."""
    size = codec.kernels[0].elements
    return 2 * size, size + size // 2 // 16 * 16 + 16, 48


@over_codecs
def test_encoding_equals_the_oracle(codec: Codec, device: PtxRun) -> None:
    """Every kind of values, with every type of gradient and residual in turn."""
    functions = codec.on(device)
    for i, kind in enumerate(cases.KINDS):
        grad, e_in = inputs(codec, kind, sizes(codec)[i % 3], TYPES[(i + i // 3) % 4])
        assert encoded(codec, functions, grad, e_in) == wanted(codec, grad, e_in), (
            kind,
            grad.dtype,
            e_in.dtype,
        )


SUMS = (("normal", "heavy", "tied"), ("negative zero", "spike"), ("normal", "nan"), ("denormal", "huge"))


@over_codecs
def test_decoding_equals_the_oracle(codec: Codec, device: PtxRun) -> None:
    functions = codec.on(device)
    for kinds, weight, numel in zip(SUMS, (1.0, 0.25, 0.5, -1.0), (*sizes(codec), 16), strict=True):
        payloads = payloads_of(codec, kinds, numel)
        for clear in (False, True) if codec.host is records else (False,):
            got = cases.values("normal", numel, 99)[0]
            got[::3] = -0.0
            want = np.zeros(numel, np.float32) if clear else got.copy()
            reference.decode_add(codec.spec, list(payloads.numpy()), want, weight, DIGEST)
            options = {"clear": True} if clear else {}
            codec.host.decode_add(
                functions, codec.spec, payloads, torch.from_numpy(got), weight, DIGEST, **options
            )
            assert got.tobytes() == want.tobytes(), (kinds, weight, clear)


@over_codecs
def test_reencoding_is_decoding_and_encoding(codec: Codec, device: PtxRun) -> None:
    functions = codec.on(device)
    for kinds, numel in zip(SUMS, (*sizes(codec), 16), strict=True):
        for rest in ("fp32", "bf16"):
            payloads, e_in = (
                payloads_of(codec, kinds, numel),
                inputs(codec, "normal", numel, ("fp32", rest))[1],
            )
            total = np.zeros(numel, np.float32)
            reference.decode_add(codec.spec, list(payloads.numpy()), total, 0.25, DIGEST)
            want = wanted(codec, torch.from_numpy(total), e_in)
            assert reencoded(codec, functions, payloads, e_in) == want, (kinds, rest)


@functools.cache
def manifest() -> dict[str, Entry]:
    return {entry.kernel.name: entry for entry in Manifest.read().entries}


def built(kernel: DeviceKernel, arch: int) -> Build:
    return next(build for build in manifest()[kernel.name].builds if build.arch == arch)


@over_codecs
def test_budgets_hold(codec: Codec, device: PtxRun) -> None:
    """Of every kernel that is shipped, each run on a grid whose share of header and checksum is that of a bucket."""
    functions, numel = codec.on(device), 64 * min(codec.kernels[0].elements, 2048)
    for size in (numel, 48):
        for types in TYPES:
            encoded(codec, functions, *inputs(codec, "normal", size, types))
        payloads = payloads_of(codec, ("normal", "heavy"), size)
        for rest in ("fp32", "bf16"):
            reencoded(codec, functions, payloads, inputs(codec, "normal", size, ("fp32", rest))[1])
        for clear in ({}, {"clear": True}) if codec.host is records else ({},):
            codec.host.decode_add(functions, codec.spec, payloads, torch.zeros(size), 1.0, DIGEST, **clear)
    mine = {kernel.name for kernel in codec.kernels if kernel.codec == str(codec.spec)}
    assert {kernel.name for kernel, _, _ in device.launches} - {"withdraw_fp32", "withdraw_bf16"} == mine
    over = []
    for kernel, elements, counters in device.launches:
        figures = Figures.of(elements, counters)
        print(f"{kernel.name}, sm_{device.arch}: {figures}; budget {kernel.budget}")
        straight = not built(kernel, device.arch).figures.loops  # then the gate has counted, in machine code
        padded = (
            elements == kernel.elements
        )  # a block of 48 elements and zeros, which tie: a bad guess to start from
        most = kernel.budget.cold if padded and kernel.budget.cold is not None else kernel.budget.instructions
        many = not straight and figures.instructions > most
        if figures.moved > kernel.budget.nbytes or many:
            over.append(f"{kernel.name}: {figures}; budget {kernel.budget}")
    assert not over, "\n".join(over)


def test_one_text_serves_two_architectures() -> None:
    """What Triton generates for sm_90 is assembled for sm_100."""
    for codec in CODECS:
        for kernel in codec.kernels:
            texts = [find_ptx(kernel.name, arch).data.decode().splitlines() for arch in (90, 100)]
            assert (
                len(
                    {
                        tuple(line for line in text if not line.startswith((".target", ".version")))
                        for text in texts
                    }
                )
                == 1
            )
