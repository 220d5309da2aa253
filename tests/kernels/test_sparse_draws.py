"""What holds over many seeds for the codecs that draw: shares, means and the contraction in expectation."""

from __future__ import annotations

import numpy as np
import pytest

from hybridcomm.kernels import host
from hybridcomm.kernels.oracles import randk
from hybridcomm.kernels.specs.randk import RandKSpec
from tests.kernels import cases
from tests.kernels.cases import DIGEST, Floats
from tests.kernels.sparse_cases import SEED, SPECS, case, compress

SIGMAS = 6.0
"""How far a mean of seeded draws may be from what it estimates: once in 10^9 by chance, and seeds are fixed."""


def seeds(count: int) -> list[int]:
    return [int(seed) for seed in np.random.default_rng(5).integers(0, 2**63, count)]


def decoded_by_seed(spec: RandKSpec, values: Floats, count: int) -> np.ndarray:
    one = case(spec, "normal", values.size)
    return np.stack([compress(one, seed=seed, values=values).decoded for seed in seeds(count)]).astype(
        np.float64
    )


@pytest.mark.parametrize("text", ["randk:0.01", "randk:0.5"])
def test_every_element_is_drawn_as_often(text: str) -> None:
    spec = SPECS[text]
    assert isinstance(spec, RandKSpec)
    count, strata = 400, 3 * spec.k
    hits = np.zeros(3 * spec.block)
    for seed in seeds(count):
        hits[randk.places(spec, randk.draw(seed, strata)).reshape(-1)] += 1
    share = 1 / spec.rows
    assert hits.sum() == count * strata, "one of each stratum, so no element twice"
    assert np.abs(hits - count * share).max() <= SIGMAS * np.sqrt(count * share * (1 - share)) + 1


def test_the_energy_sent_is_that_of_the_contraction() -> None:
    """Two-sided: on average at least d of the energy is sent, and not more than 1 / rows of it."""
    spec = SPECS["randk:0.5"]
    assert isinstance(spec, RandKSpec)
    values = cases.values("heavy", 4 * spec.block, 3)[0]
    values = (np.sign(values) * np.abs(values) ** np.float32(0.05)).astype(np.float32)
    before = (values.astype(np.float64) ** 2).sum()
    decoded = decoded_by_seed(spec, values, 300)
    sent = before - ((values - decoded) ** 2).sum(axis=1)
    noise = SIGMAS * sent.std() / np.sqrt(len(sent))
    assert spec.contraction is not None
    assert spec.contraction * before - noise <= sent.mean() <= before / spec.rows + noise
    assert noise < 0.1 * before / spec.rows, "the bound says something"


@pytest.mark.parametrize("text", ["randk:0.1+unbiased", "randk:0.004+unbiased"])
def test_the_mean_of_an_unbiased_codec_is_the_gradient(text: str) -> None:
    spec = SPECS[text]
    assert isinstance(spec, RandKSpec)
    values = cases.values("normal", spec.block + 7, 4)[0]
    decoded = decoded_by_seed(spec, values, 3000)
    scale = np.abs(values).max() * 2.0**-5  # at most: the largest of what is drawn has 2^5 scales and more
    noise = SIGMAS * np.sqrt(spec.rows * (values.astype(np.float64) ** 2 + scale**2 / 4) / len(decoded))
    cut = scale * 2.0**-16 * spec.rows  # codes have 16 binary places
    error = np.abs(decoded.mean(axis=0) - values)
    assert (error <= noise + cut).all()
    assert (error <= noise / SIGMAS).mean() < 0.9, "and the bound is not so wide that anything would pass"


def test_without_error_feedback_the_other_variant_is_biased() -> None:
    """The control of the test above: unscaled draws average to a share of the gradient."""
    spec = SPECS["randk:0.5"]
    assert isinstance(spec, RandKSpec)
    values = cases.values("normal", spec.block, 4)[0]
    mean = decoded_by_seed(spec, values, 300).mean(axis=0)
    assert (mean @ values) / (values @ values) == pytest.approx(0.5, abs=0.1)


def test_a_payload_says_what_it_was_drawn_from() -> None:
    spec = SPECS["randk:0.01"]
    grad, payload = cases.values("normal", 5000, 1)[0], np.zeros(spec.nbytes(5000), np.uint8)
    host.encode(spec, grad, None, None, payload, DIGEST, seed=SEED)
    assert int(payload[56:64].view("<u8")[0]) == SEED
    other = payload.copy()
    host.encode(spec, grad, None, None, other, DIGEST, seed=SEED + 1)
    assert (other != payload)[64:].any()
