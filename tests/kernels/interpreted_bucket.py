"""Packing into and out of buckets against torch on the host, bit for bit, under TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hybridcomm.kernels.triton import bucket, launch_bucket
from tests.kernels import cases

TYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3, 5), (bucket.CHUNK + 9,), (1,), (2, bucket.CHUNK), (8,))
FILL = -3.0


def tensors() -> list[torch.Tensor]:
    made = []
    for i, shape in enumerate(SHAPES):
        kind = ("normal", "heavy", "inf", "half steps", "nan")[i]
        values = torch.from_numpy(cases.values(kind, int(np.prod(shape)), i)[i == 2])
        made.append(values.reshape(shape).to(TYPES[i % 3]))
    made.append(torch.arange(40, dtype=torch.float32)[1:])  # begins on no 16 bytes
    return made


def offsets(made: list[torch.Tensor], gap: int) -> list[int]:
    return [0, *np.cumsum([-(-t.numel() // 8) * 8 + gap for t in made])[:-1].tolist()]


def as_bits(tensor: torch.Tensor) -> bytes:
    """NaN payloads are no part of the promise."""
    wide = tensor.reshape(-1).float().nan_to_num(nan=12345.0, posinf=torch.inf, neginf=-torch.inf)
    return wide.numpy().tobytes()


def check_pack_and_unpack(
    made: list[torch.Tensor], dtype: torch.dtype, gap: int, scale: float, kernel: Any = bucket.FUNCTION
) -> None:
    """Into a bucket of ``dtype`` with gaps and out of it again, as torch would."""
    places = offsets(made, gap)
    where = launch_bucket.layout(made, places)
    got = torch.full((where.end + 5,), FILL).to(dtype)
    want = got.clone()
    for tensor, place in zip(made, places, strict=True):
        want[place : place + tensor.numel()] = (tensor.float() * np.float32(scale)).reshape(-1).to(dtype)
    launch_bucket.pack(where, got, scale, kernel=kernel)
    assert as_bits(got) == as_bits(want)
    expected = [
        (want[p : p + t.numel()].float() * np.float32(scale)).to(t.dtype).reshape(t.shape)
        for t, p in zip(made, places, strict=True)
    ]
    launch_bucket.unpack(where, got, scale, kernel=kernel)
    for tensor, wanted in zip(made, expected, strict=True):
        assert as_bits(tensor) == as_bits(wanted)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("gap", "scale"), [(0, 1.0), (3, float(np.float32(1 / 3)))])
def test_pack_and_unpack_equal_torch(dtype: torch.dtype, gap: int, scale: float) -> None:
    check_pack_and_unpack(tensors(), dtype, gap, scale)


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_every_tie_and_overflow_is_rounded_as_torch_does(dtype: torch.dtype) -> None:
    high = np.arange(1 << 12, dtype=np.uint32) << np.uint32(20)
    low = np.array([0x0, 0xFFF, 0x1000, 0x3000, 0x7FFF, 0x8000, 0x18000, 0xFFFFF], np.uint32)
    source = torch.from_numpy((high[:, None] | low).reshape(-1).view(np.float32))
    where = launch_bucket.layout([source], [0])
    got = torch.zeros(where.end, dtype=dtype)
    launch_bucket.pack(where, got)
    assert as_bits(got) == as_bits(source.to(dtype))


def test_what_does_not_fit_is_refused() -> None:
    a = torch.zeros(8)
    with pytest.raises(ValueError, match="at least one"):
        launch_bucket.layout([], [])
    with pytest.raises(ValueError, match="tensor 0: float32"):
        launch_bucket.layout([a.double()], [0])
    with pytest.raises(ValueError, match="tensor 1: a contiguous"):
        launch_bucket.layout([a, torch.zeros(4, 4).t()], [0, 8])
    for places in ([0, 7], [8, 0], [-1, 8]):
        with pytest.raises(ValueError, match="ascending"):
            launch_bucket.layout([a, a], places)
    where = launch_bucket.layout([a, a], [0, 8])
    with pytest.raises(ValueError, match="16 elements wanted"):
        launch_bucket.pack(where, torch.zeros(15))
    with pytest.raises(ValueError, match="float32 or"):
        launch_bucket.unpack(where, torch.zeros(16, dtype=torch.float64))
