"""The Triton kernels, executed from their shipped PTX behind their own host code, against the oracle, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybridcomm.kernels import reference
from hybridcomm.kernels.cubins import find_ptx
from hybridcomm.kernels.triton import launch_records
from tests.kernels import cases
from tests.kernels.cases import DIGEST
from tests.kernels.executed import complaints, of_triton
from tests.kernels.ptx_run import PtxRun
from tests.kernels.ptx_triton import CODECS, Codec, encoded, inputs, payloads_of, reencoded, wanted

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
        for clear in (False, True) if codec.host is launch_records else (False,):
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
    sums = (SUMS[0], ("negative zero",), *SUMS[2:])
    for kinds, numel in zip(sums, (*sizes(codec), 16), strict=True):
        for rest in ("fp32", "bf16"):
            payloads, e_in = (
                payloads_of(codec, kinds, numel),
                inputs(codec, "normal", numel, ("fp32", rest))[1],
            )
            e_in[::2] = -0.0  # with payloads of as much: their sum begins at a positive zero, and stays one
            total = np.zeros(numel, np.float32)
            reference.decode_add(codec.spec, list(payloads.numpy()), total, 0.25, DIGEST)
            want = wanted(codec, torch.from_numpy(total), e_in)
            assert reencoded(codec, functions, payloads, e_in) == want, (kinds, rest)


@over_codecs
def test_budgets_hold(codec: Codec, device: PtxRun) -> None:
    """Of every kernel that is shipped."""
    launches = list(of_triton(codec, device.arch))
    names = {each.kernel.name for each in launches if each.kernel.codec}
    assert names == {kernel.name for kernel in codec.kernels if kernel.codec == str(codec.spec)}
    assert not complaints(launches)


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
