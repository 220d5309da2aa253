"""What block-wise top-k with error feedback promises, checked on the C++ kernels, the oracle left out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm.kernels import TopKSpec, host
from hybridcomm.kernels.vectors import NONFINITE
from tests.kernels import cases
from tests.kernels.cases import DIGEST, Bytes, Case, Floats
from tests.numerics import topk_error_bound

FINITE = tuple(kind for kind in cases.KINDS if kind not in NONFINITE)


def compress(case: Case) -> tuple[Floats, Bytes, Floats, Floats]:
    """Compensated gradient, payload, new residual and decoded values."""
    grad, e_in = case.inputs()
    payload, e_out = np.zeros(case.spec.nbytes(case.numel), np.uint8), np.zeros(case.numel, np.float32)
    assert host.encode(case.spec, grad, e_in, e_out, payload, DIGEST) == 0
    decoded = np.zeros(case.numel, np.float32)
    host.decode_add(case.spec, [payload], decoded, 1.0, DIGEST)
    return (grad if e_in is None else grad + e_in), payload, e_out, decoded


def blocks(values: Floats, spec: TopKSpec) -> np.ndarray:
    """(nblocks, block) fp64, the last one padded with zeros."""
    padded = np.zeros(spec.nblocks(values.size) * spec.block)
    padded[: values.size] = values
    return padded.reshape(-1, spec.block)


def records(payload: Bytes, spec: TopKSpec, numel: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices and codes (nblocks, k), scales (nblocks,) fp64; read by docs/payload.md, not by the oracle."""
    nblocks, (block, k, value_bits) = -(-numel // spec.block), spec.layout
    scales = 2.0 ** (payload[64 : 64 + nblocks].astype(np.float64) - 127)
    start = 64 + (nblocks + 15) // 16 * 16
    raw = payload[start : start + 2 * k * nblocks].view("<u2").astype(np.int64).reshape(nblocks, k)
    codes = raw >> (16 - value_bits)
    return raw % block, np.where(codes >= 1 << (value_bits - 1), codes - (1 << value_bits), codes), scales


@settings(deadline=None, max_examples=150)
@given(case=cases.cases(kinds=FINITE))
def test_nothing_is_lost(case: Case) -> None:
    acc, _, e_out, decoded = compress(case)
    assert (decoded.astype(np.float64) + e_out == acc).all()


@settings(deadline=None, max_examples=150)
@given(case=cases.cases(kinds=FINITE))
def test_no_other_choice_keeps_more(case: Case) -> None:
    acc, payload, _, _ = compress(case)
    spec, (index, _, _) = case.spec, records(payload, case.spec, case.numel)
    size = np.abs(blocks(acc, spec))
    best = np.sort(size, axis=1)[:, ::-1][:, : spec.layout[1]]
    for b in range(len(size)):
        valid = min(case.numel - b * spec.block, spec.block)
        kept = index[b][: min(valid, spec.layout[1])]
        assert len(set(kept)) == len(kept)
        assert (np.sort(size[b, kept])[::-1] == best[b][: len(kept)]).all()
        dropped = np.setdiff1d(np.arange(valid), kept)
        threshold = size[b, kept].min()
        ties = kept[size[b, kept] == threshold]
        assert (dropped[size[b, dropped] == threshold] > ties.max()).all(), "ties go to the lowest index"
        assert (np.diff(kept) > 0).all(), "records are in index order"


@settings(deadline=None, max_examples=150)
@given(case=cases.cases(kinds=FINITE))
def test_the_error_is_neither_more_nor_less_than_it_must_be(case: Case) -> None:
    acc, payload, e_out, _ = compress(case)
    spec, (index, codes, scales) = case.spec, records(payload, case.spec, case.numel)
    size, rest = np.abs(blocks(acc, spec)), blocks(e_out, spec)
    kept = np.sort(size, axis=1)[:, ::-1][:, : spec.layout[1]]
    error, least = (rest**2).sum(), (size**2).sum() - (kept**2).sum()
    slack = 2.0**-52 * size.size * (size**2).sum()  # of the fp64 sums of this test
    assert error >= least - slack
    block, k, value_bits = spec.layout
    normal = bool(
        (payload[64 : 64 + len(size)] > 1).all()
    )  # else the scale's floor, 2^-126, is the bound's step
    floor = 0.0 if normal else size.size * 2.0**-252
    assert error <= topk_error_bound(acc, block=block, k=k, value_bits=value_bits) + floor + slack
    assert error <= (size**2).sum() + slack
    step = np.where(np.abs(codes) == spec.qmax, 1.0, 0.5) * scales[:, None]
    at = np.take_along_axis(np.abs(rest), index, axis=1)
    elements = np.minimum(
        block, case.numel - block * np.arange(len(rest))
    )  # of each block; the last may have few
    recorded = np.arange(k)[None, :] < elements[:, None]  # the other records are padding
    assert (at <= step)[recorded].all()
    assert (at <= np.take_along_axis(size, index, axis=1)).all()


@settings(deadline=None, max_examples=100)
@given(case=cases.cases(kinds=("normal", "heavy", "drifting scale", "same magnitude", "half steps")))
def test_every_block_contracts(case: Case) -> None:
    acc, _, e_out, _ = compress(case)
    spec = case.spec
    before, after = (blocks(acc, spec) ** 2).sum(axis=1), (blocks(e_out, spec) ** 2).sum(axis=1)
    slack = 2.0**-52 * spec.block * before
    assert (after <= (1 - spec.contraction) * before + slack).all()


@settings(deadline=None, max_examples=30)
@given(spec=cases.specs(), numel=st.integers(0, 20_000))
def test_the_size_is_a_function_of_spec_and_numel(spec: TopKSpec, numel: int) -> None:
    nblocks = -(-numel // spec.block)
    scales, body = -(-nblocks // 16) * 16, -(-2 * spec.layout[1] * nblocks // 16) * 16
    assert spec.nbytes(numel) == 64 + scales + body
    assert host.nbytes(spec, numel) == spec.nbytes(numel)


def test_residuals_deliver_everything_in_the_end() -> None:
    spec, numel, steps = TopKSpec(block=64, k=4), 1000, 60
    grad = np.random.default_rng(8).integers(-50, 51, numel).astype(np.float32)
    e, applied = np.zeros(numel, np.float32), np.zeros(numel)
    payload = np.zeros(spec.nbytes(numel), np.uint8)
    for step in range(steps):
        g = grad if step < steps // 4 else np.zeros_like(grad)
        host.encode(spec, g, e, e, payload, DIGEST)
        out = np.zeros(numel, np.float32)
        host.decode_add(spec, [payload], out, 1.0, DIGEST)
        applied += out
        assert (applied + e == grad.astype(np.float64) * min(step + 1, steps // 4)).all()
    assert np.abs(e).sum() < np.abs(grad).sum()


@pytest.mark.parametrize("law", ["conservation", "optimality"])
def test_a_planted_loss_breaks_the_law(law: str) -> None:
    case = Case(spec=TopKSpec(block=64, k=3), kind="normal", numel=640, seed=1)
    acc, payload, e_out, decoded = compress(case)
    if law == "conservation":
        e_out[17] = np.nextafter(e_out[17], np.float32(9))
        assert not (decoded.astype(np.float64) + e_out == acc).all()
    else:
        index, _, _ = records(payload, case.spec, case.numel)
        size = np.abs(blocks(acc, case.spec))
        index[3, 1] = int(np.argmin(size[3]))
        kept = np.take_along_axis(size, index, axis=1)
        best = np.sort(size, axis=1)[:, ::-1][:, : case.spec.layout[1]]
        assert ((kept**2).sum(axis=1) < (best**2).sum(axis=1)).any()
