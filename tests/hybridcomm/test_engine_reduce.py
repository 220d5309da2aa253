"""reduce(): one rounding to nearest even, the same bits from every instruction set; scale()."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hybridcomm import _C, reduction
from hybridcomm.errors import HybridCommError
from hybridcomm.lower import CODECS, COLLECTIVES, DTYPES, OPS
from tests.interpreter import combine

ISAS = ("scalar", "avx2", "avx512")
Bits = np.ndarray[Any, Any]


def can_reduce(op: str, dtype: str) -> bool:
    try:
        reduction.check(op, dtype)
    except HybridCommError:
        return False
    return True


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> int:
    index = ISAS.index(request.param)
    if index > _C.best_isa():
        pytest.skip(f"this CPU has no {request.param} instruction set")
    return index


def add(dtype: str, sources: list[Bits], *, isa: int, divisor: int = 1, op: str = "sum") -> Bits:
    """``sources``: arrays of the bits of ``dtype``."""
    out = np.full_like(sources[0], 0x55)
    _C.reduce(
        DTYPES.index(dtype),
        OPS.index(op),
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


STORAGE = {"bfloat16": "uint16", "float16": "uint16", "bool": "uint8"}
REDUCIBLE = [(op, dtype) for op in OPS if op != "none" for dtype in DTYPES if can_reduce(op, dtype)]


@pytest.mark.parametrize(("op", "dtype"), REDUCIBLE)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_instruction_set_gives_the_same_bits(op: str, dtype: str, count: int) -> None:
    storage = STORAGE.get(dtype, dtype)
    dice = np.random.default_rng(count)
    for numel in (0, 1, 7, 16, 17, 2047, 2048, 2049, 5003):
        raw = [dice.bytes(numel * np.dtype(storage).itemsize) for _ in range(count)]
        sources = [np.frombuffer(data, storage).copy() for data in raw]
        if dtype in ("float32", "float64", "complex64", "complex128"):
            for source in sources:
                source[~np.isfinite(source)] = 1.0  # which NaN comes out of two is not specified
        elif dtype in ("bfloat16", "float16"):
            for source in sources:
                source[~np.isfinite(widen(dtype, source))] = 0x3C00
        for divisor in (1, 3) if op == "mean" else (1,):
            results = {
                add(dtype, sources, isa=isa, divisor=divisor, op=op).tobytes()
                for isa in range(_C.best_isa() + 1)
            }
            assert len(results) == 1, (numel, divisor)


def random_values(dtype: str, numel: int, dice: np.random.Generator) -> Bits:
    if dtype == "bool":
        return dice.integers(0, 2, numel).astype(bool)
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        return dice.integers(info.min, info.max, numel, dtype=dtype, endpoint=True)
    values = dice.standard_normal(numel) + (1j * dice.standard_normal(numel) if "complex" in dtype else 0)
    return values.astype(dtype)


@pytest.mark.parametrize(("op", "dtype"), [(o, d) for o, d in REDUCIBLE if d != "bfloat16"])
def test_each_operation_is_numpys(isa: int, op: str, dtype: str) -> None:
    """In group order, integers wrapping, float16 combined in float32 and rounded once: the same bits."""
    dice = np.random.default_rng(7)
    sources = [random_values(dtype, 2311, dice) for _ in range(4)]
    divisor = 4 if op == "mean" else 1
    want = combine(op, sources, divisor)
    assert add(dtype, sources, isa=isa, op=op, divisor=divisor).tobytes() == want.tobytes()
    swapped = add(dtype, [sources[1], sources[0], *sources[2:]], isa=isa, op=op)
    assert add(dtype, sources[:3], isa=isa, op=op).tobytes() != swapped.tobytes(), "a lacking source is seen"


@pytest.mark.parametrize("op", ["min", "max", "product", "sum"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_nan_comes_through_wherever_it_stands(isa: int, dtype: str, op: str) -> None:
    """As in torch.minimum and torch.maximum; gloo's own all-reduce loses it, depending on the rank."""
    kind = getattr(torch, dtype)
    rows = torch.tensor(
        [[np.nan, 1.0, 2.0, -1.0], [1.0, np.nan, 3.0, -2.0], [0.5, 0.25, np.nan, -3.0]], dtype=kind
    )
    bits = rows.view(
        torch.int64 if dtype == "float64" else torch.int32 if dtype == "float32" else torch.int16
    )
    got = torch.from_numpy(add(dtype, list(bits.numpy()), isa=isa, op=op)).view(kind)
    assert got.isnan().tolist() == [True, True, True, False]
    assert got[3] == {"min": -3, "max": -1, "product": -6, "sum": -6}[op]


@pytest.mark.parametrize("op", ["min", "max"])
def test_half_precision_extremes_are_torchs(isa: int, op: str) -> None:
    for dtype in ("bfloat16", "float16"):
        every = halves(dtype)
        partner = np.random.default_rng(8).permutation(every)
        exact = (np.minimum if op == "min" else np.maximum)(widen(dtype, every), widen(dtype, partner))
        got = widen(dtype, add(dtype, [every, partner], isa=isa, op=op))
        assert (got == exact).all()


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "float64", "int32", "int8", "uint8", "int64", "complex64"]
)
def test_scale_multiplies_and_rounds_once(dtype: str) -> None:
    values = random_values(dtype, 1003, np.random.default_rng(9))
    if np.issubdtype(dtype, np.integer):
        factor, want = 3.0, values * np.dtype(dtype).type(3)
    elif dtype == "float16":
        factor, want = 0.3, (values.astype(np.float32) * np.float32(0.3)).astype(dtype)
    else:
        factor, want = 0.3, values * (0.3 if dtype == "float64" else np.float32(0.3))
    _C.scale(DTYPES.index(dtype), values.ctypes.data, values.size, factor)
    assert values.tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "int8"])
def test_integers_wrap(isa: int, dtype: str) -> None:
    info = np.iinfo(dtype)
    top, one = np.full(33, info.max, dtype), np.ones(33, dtype)
    assert (add(dtype, [top, one], isa=isa) == info.min).all()


def test_the_destination_may_be_a_source(isa: int) -> None:
    a, b = np.arange(5000, dtype=np.float32), np.ones(5000, np.float32)
    _C.reduce(0, 0, b.ctypes.data, [a.ctypes.data, b.ctypes.data, a.ctypes.data], 5000, isa=isa)
    assert (b == 2 * a + 1).all()


def test_names_of_the_wire_format_agree() -> None:
    """lower.py and csrc/tag.cpp hold the same lists in the same order."""
    for c, collective in enumerate(COLLECTIVES):
        for d, dtype in enumerate(DTYPES):
            for o, op in enumerate(OPS):
                for k, codec in enumerate(CODECS):
                    text = _C.describe(c, d, o, k, 7)
                    call = f"{collective}({op}{', ' + codec if k else ''})"
                    if collective == "message":  # point to point: no op, but a tag
                        call = "message with tag 0"
                    assert text == f"{call} of 7 {dtype}"
    assert "unknown" in _C.describe(len(COLLECTIVES), 0, 0, 0, 1)
