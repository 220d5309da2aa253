"""What powersgd promises, on the C++ kernels: an orthogonal projection, close to what any low rank can do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from hybridcomm.kernels.oracles import powersgd
from hybridcomm.kernels.specs.powersgd import PowerSGDSpec
from tests.kernels.cases import Case, Floats
from tests.kernels.sparse_cases import FINITE, SEED, SPECS, TEXTS, Pass, any_case, case, compress
from tests.numerics import UNIT_ROUNDOFF

LOW_RANK = tuple(text for text in TEXTS if text.startswith("powersgd"))
U = UNIT_ROUNDOFF["float32"]
SIGMAS = 6.0


def matrix(spec: PowerSGDSpec, values: Floats) -> np.ndarray:
    """(rows, block) fp64, the last row padded with zeros."""
    padded = np.zeros(spec.rows(values.size) * spec.block)
    padded[: values.size] = values
    return padded.reshape(-1, spec.block)


def slack(spec: PowerSGDSpec, rows: int) -> float:
    """Relative, of energies: sums over a row and a column, and columns that are orthogonal only to 2^-16.

    A column that keeps more than 2^-16 of its energy is divided by at least 2^-8 of its length, and so carries
    roundings of 2^8 units.
    """
    return 2 * spec.rank * (2.0**8 + spec.block / 16 + rows) * U


def passed(text: str, values: Floats, seed: int = SEED) -> tuple[PowerSGDSpec, Pass]:
    spec = SPECS[text]
    assert isinstance(spec, PowerSGDSpec)
    return spec, compress(case(spec, "", values.size), seed=seed, values=values)


@settings(deadline=None, max_examples=100)
@given(one=any_case(kinds=FINITE, texts=LOW_RANK))
def test_nothing_is_lost_but_one_rounding(one: Case) -> None:
    done = compress(one)
    gap = np.abs(done.decoded.astype(np.float64) + done.rest - done.acc)
    assert (gap <= U * np.abs(done.rest)).all()


@settings(deadline=None, max_examples=100)
@given(
    one=any_case(kinds=("normal", "drifting scale", "same magnitude", "half steps", "spike"), texts=LOW_RANK)
)
def test_the_error_is_between_the_best_of_that_rank_and_all(one: Case) -> None:
    """A projection removes energy or none; no approximation of that rank leaves less than the singular values say."""
    done, spec = compress(one), one.spec
    assert isinstance(spec, PowerSGDSpec)
    before, rest = matrix(spec, done.acc), done.rest.astype(np.float64)
    if not before.size:
        return
    energy, room = (before**2).sum(), slack(spec, len(before)) * (before**2).sum()
    whole = before[
        : one.numel // spec.block
    ]  # rows without padding: what a matrix of that rank can leave of them
    scale = np.abs(before).max() or 1.0
    best = (np.linalg.svd(whole / scale, compute_uv=False)[spec.rank :] ** 2).sum() * scale**2
    assert best - room <= (rest**2).sum() <= energy + room


@pytest.mark.parametrize("text", LOW_RANK)
def test_a_matrix_of_that_rank_is_sent_whole(text: str) -> None:
    spec = SPECS[text]
    assert isinstance(spec, PowerSGDSpec)
    rng, rows = np.random.default_rng(3), 40
    left = rng.standard_normal((rows, spec.rank))
    values = (left @ rng.standard_normal((spec.rank, spec.block))).astype(np.float32).reshape(-1)
    _, done = passed(text, values)
    lost = (done.rest.astype(np.float64) ** 2).sum() / (values.astype(np.float64) ** 2).sum()
    assert lost <= slack(spec, rows) ** 2 + slack(spec, rows) * U


def test_what_is_sent_is_at_least_what_the_start_saw() -> None:
    """|M^T M q|^2 / |M q|^2 >= |M q|^2 / |q|^2, seed by seed; its mean over seeds is the contraction's 1 / block."""
    text = "powersgd:1/b16"
    values = np.random.default_rng(4).standard_normal(16 * 30).astype(np.float32)
    sent, shares = [], []
    for seed in range(300):
        spec, done = passed(text, values, seed)
        m = matrix(spec, values)
        start = powersgd.start(spec, seed)[0].astype(np.float64)
        energy = (m**2).sum()
        floor = ((m @ start) ** 2).sum() / (start**2).sum()
        sent.append((energy - (done.rest.astype(np.float64) ** 2).sum()) / energy)
        shares.append(floor / energy)
        assert sent[-1] >= shares[-1] - slack(spec, len(m))
    noise = SIGMAS * np.std(shares) / np.sqrt(len(shares))
    assert abs(np.mean(shares) - 1 / 16) <= noise
    assert np.mean(sent) >= SPECS[text].contraction


@pytest.mark.parametrize("text", LOW_RANK)
def test_what_could_overflow_stays_in_the_residual(text: str) -> None:
    values = np.random.default_rng(5).standard_normal(3 * SPECS[text].block).astype(np.float32)
    values[7] = 2.0**100
    _, done = passed(text, values)
    assert not done.decoded.any()
    assert done.rest.tobytes() == values.tobytes()
    values[7] = 2.0**99
    _, done = passed(text, values)
    assert done.decoded.any()
