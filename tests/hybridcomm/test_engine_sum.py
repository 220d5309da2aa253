"""sum(): one rounding to nearest even, the same bits from every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hybridcomm import _C
from hybridcomm.lower import CODECS, COLLECTIVES, DTYPES, OPS

ISAS = ("scalar", "avx2", "avx512")
Bits = np.ndarray[Any, Any]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> int:
    index = ISAS.index(request.param)
    if index > _C.best_isa():
        pytest.skip(f"this CPU has no {request.param} instruction set")
    return index


def add(dtype: str, sources: list[Bits], *, isa: int, divisor: int = 1) -> Bits:
    """``sources``: arrays of the bits of ``dtype``."""
    out = np.full_like(sources[0], 0x55)
    _C.sum(
        DTYPES.index(dtype),
        out.ctypes.data,
        [source.ctypes.data for source in sources],
        out.size,
        divisor=divisor,
        isa=isa,
    )
    return out


def halves(dtype: str) -> Bits:
    """Every 16-bit pattern whose value is not NaN."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    return bits[~np.isnan(widen(dtype, bits))]


def widen(dtype: str, bits: Bits) -> np.ndarray[Any, Any]:
    return torch.from_numpy(bits.view(np.int16)).view(getattr(torch, dtype)).float().numpy()


def narrow(dtype: str, values: np.ndarray[Any, Any]) -> Bits:
    """torch's rounding, to nearest even."""
    rounded = torch.from_numpy(values).to(getattr(torch, dtype))
    return rounded.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_sums_round_once_to_nearest_even(isa: int, dtype: str) -> None:
    """Every value with three random partners: subnormals, infinities and overflow included."""
    every = halves(dtype)
    dice = np.random.default_rng(3)
    partners = [dice.permutation(every) for _ in range(3)]
    for sources in ([every], [every, partners[0]], [every, *partners]):
        with np.errstate(all="ignore"):
            exact = widen(dtype, sources[0])
            for source in sources[1:]:
                exact = exact + widen(dtype, source)
        want, got = narrow(dtype, exact), add(dtype, sources, isa=isa)
        nan = np.isnan(exact)  # inf - inf: a NaN of any payload
        assert np.isnan(widen(dtype, got[nan])).all()
        assert (got[~nan] == want[~nan]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_means_round_once(isa: int, dtype: str) -> None:
    every = halves(dtype)
    partner = np.random.default_rng(4).permutation(every)
    with np.errstate(all="ignore"):
        exact = (widen(dtype, every) + widen(dtype, partner)) / np.float32(3)
    finite = ~np.isnan(exact)
    got = add(dtype, [every, partner], isa=isa, divisor=3)
    assert (got[finite] == narrow(dtype, exact)[finite]).all()


def test_control_truncation_is_not_rounding() -> None:
    """Negative control: the patterns tell rounding from cutting off, and from rounding each addition."""
    every = halves("bfloat16")
    partners = [np.random.default_rng(n).permutation(every) for n in range(2)]
    with np.errstate(all="ignore"):
        exact = sum((widen("bfloat16", p) for p in partners), widen("bfloat16", every))
        stepwise = widen(
            "bfloat16", narrow("bfloat16", widen("bfloat16", every) + widen("bfloat16", partners[0]))
        )
        twice = narrow("bfloat16", stepwise + widen("bfloat16", partners[1]))
    cut = (exact.view(np.uint32) >> 16).astype(np.uint16)
    good = add("bfloat16", [every, *partners], isa=0)
    finite = np.isfinite(exact)
    assert (good[finite] != cut[finite]).any()
    assert (good[finite] != twice[finite]).any()


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "uint8"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_instruction_set_gives_the_same_bits(dtype: str, count: int) -> None:
    storage = {"bfloat16": np.uint16, "float16": np.uint16}.get(dtype, dtype)
    dice = np.random.default_rng(count)
    for numel in (0, 1, 7, 16, 17, 2047, 2048, 2049, 5003):
        raw = [dice.bytes(numel * np.dtype(storage).itemsize) for _ in range(count)]
        sources = [np.frombuffer(data, storage).copy() for data in raw]
        if dtype in ("float32", "float64"):
            for source in sources:
                source[~np.isfinite(source)] = 1.0  # which NaN comes out of two is not specified
        elif dtype in ("bfloat16", "float16"):
            for source in sources:
                source[~np.isfinite(widen(dtype, source))] = 0x3C00
        for divisor in (1, 3) if dtype not in ("int64", "int32") else (1,):
            results = {
                add(dtype, sources, isa=isa, divisor=divisor).tobytes() for isa in range(_C.best_isa() + 1)
            }
            assert len(results) == 1, (numel, divisor)


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_integers_wrap(isa: int, dtype: str) -> None:
    info = np.iinfo(dtype)
    top, one = np.full(33, info.max, dtype), np.ones(33, dtype)
    assert (add(dtype, [top, one], isa=isa) == info.min).all()


def test_the_destination_may_be_a_source(isa: int) -> None:
    a, b = np.arange(5000, dtype=np.float32), np.ones(5000, np.float32)
    _C.sum(0, b.ctypes.data, [a.ctypes.data, b.ctypes.data, a.ctypes.data], 5000, isa=isa)
    assert (b == 2 * a + 1).all()


def test_names_of_the_wire_format_agree() -> None:
    """lower.py and csrc/tag.cpp hold the same lists in the same order."""
    for c, collective in enumerate(COLLECTIVES):
        for d, dtype in enumerate(DTYPES):
            for o, op in enumerate(OPS):
                for k, codec in enumerate(CODECS):
                    text = _C.describe(c, d, o, k, 7)
                    assert text == f"{collective}({op}{', ' + codec if k else ''}) of 7 {dtype}"
    assert "unknown" in _C.describe(len(COLLECTIVES), 0, 0, 0, 1)
