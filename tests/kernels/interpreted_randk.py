"""randk's Triton kernels against the oracle, byte for byte; run by test_triton.py under TRITON_INTERPRET=1."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm.kernels import reference
from hybridcomm.kernels.device_codec import jit_codec
from hybridcomm.kernels.oracles import randk as oracle
from hybridcomm.kernels.specs.randk import RandKSpec
from tests.kernels import cases, sparse_cases
from tests.kernels.cases import DIGEST, Case
from tests.kernels.sparse_cases import SEED
from tests.kernels.triton_sparse import encoder, matches_decoding, matches_reencoding
from tests.kernels.triton_sparse import oracle as widened_oracle

SPECS = tuple(sparse_cases.SPECS[text] for text in sparse_cases.TEXTS if text.startswith("randk"))
SMALL = RandKSpec(rows=2)
UNBIASED = RandKSpec(rows=3, unbiased=True)


def device(seed: int, grad: str = "fp32", rest: str = "fp32", decay: float = 1.0) -> Any:
    """The kernels behind the oracle's interface, drawing by ``seed``."""
    return encoder(grad, rest, decay, seed=seed)


def wanted(seed: int) -> Any:
    return partial(reference.encode, seed=seed)


def without_feedback(case: Case) -> Case:
    """What is unbiased takes no residual."""
    return Case(spec=case.spec, kind=case.kind, numel=case.numel, seed=case.seed, memoryless=True)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_encode_equals_the_oracle_at_the_edges(spec: RandKSpec) -> None:
    sizes = (spec.block + 1, spec.block - 1, 17, 15, 2 * spec.block, 0)
    step = 1 if spec.block < 3200 else 3  # a program of the largest blocks takes long
    for i, kind in enumerate(cases.KINDS[::step]):
        case = Case(spec=spec, kind=kind, numel=sizes[i % 6], seed=7, memoryless=spec.unbiased or i % 3 == 0)
        assert cases.run(case, device(SEED + i)) == cases.run(case, wanted(SEED + i)), case


@settings(deadline=None, max_examples=12)
@given(case=cases.cases(blocks=2, of=st.sampled_from(SPECS)), seed=st.integers(0, 2**64 - 1))
def test_encode_equals_the_oracle(case: Case, seed: int) -> None:
    given_ = without_feedback(case) if case.spec.unbiased else case
    assert cases.run(given_, device(seed)) == cases.run(given_, wanted(seed))


@pytest.mark.parametrize("grad", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rest", ["fp32", "bf16"])
def test_types_and_decay_equal_the_oracle(grad: str, rest: str) -> None:
    for kind in ("normal", "heavy", "negative zero", "huge", "denormal"):
        case = Case(spec=SMALL, kind=kind, numel=96, seed=3)
        assert cases.run(case, device(0, grad, rest, 0.9)) == cases.run(
            case, widened_oracle(grad, rest, 0.9)
        ), kind


@settings(deadline=None, max_examples=8)
@given(data=st.data(), first=cases.cases(blocks=2, of=st.sampled_from(SPECS)))
def test_decode_equals_the_oracle(data: st.DataObject, first: Case) -> None:
    assert matches_decoding(first, data)


def test_payloads_of_several_seeds_are_each_taken_by_their_own() -> None:
    """Elements that several draw too, in the payloads' order."""
    numel = 3 * SMALL.block + 16
    payloads = []
    for seed in range(5):
        grad, payload = cases.values("heavy", numel, seed)[0], np.zeros(SMALL.nbytes(numel), np.uint8)
        reference.encode(SMALL, grad, None, np.zeros(numel, np.float32), payload, DIGEST, seed=SEED * seed)
        payloads.append(payload)
    want = cases.values("normal", numel, 99)[0]
    got = torch.from_numpy(want.copy())
    reference.decode_add(SMALL, payloads, want, 0.3, DIGEST)
    jit_codec(SMALL).decode_add(torch.from_numpy(np.stack(payloads)), got, 0.3, DIGEST)
    assert got.numpy().tobytes() == want.tobytes()


@pytest.mark.parametrize("rest", ["fp32", "bf16"])
@pytest.mark.parametrize("kinds", [("normal", "heavy", "tied"), ("normal", "inf")], ids=["finite", "flagged"])
def test_reencoding_is_decoding_and_encoding(kinds: tuple[str, ...], rest: str) -> None:
    assert matches_reencoding(SPECS[0], 3200 + 48, kinds, rest)


def _half_a_seed(seed: int, count: int) -> oracle.Words:
    return oracle.mix(oracle.mix(np.arange(count, dtype=np.uint32) ^ np.uint32(seed & 0xFFFFFFFF)))


def _same_in_every_block(seed: int, count: int) -> oracle.Words:
    return np.resize(_DRAW(seed, SMALL.k), count)


_DRAW = oracle.draw


@pytest.mark.parametrize("mutant", [_half_a_seed, _same_in_every_block])
def test_a_planted_bug_in_drawing_is_caught(mutant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(spec=SMALL, kind="normal", numel=3 * SMALL.block, seed=1)
    right = cases.run(case, device(SEED))
    assert right == cases.run(case, wanted(SEED))
    monkeypatch.setattr(oracle, "draw", mutant)
    assert right != cases.run(case, wanted(SEED))


def test_a_planted_bug_in_rounding_at_random_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(spec=UNBIASED, kind="normal", numel=2 * UNBIASED.block, seed=1, memoryless=True)
    right = cases.run(case, device(SEED))
    assert right == cases.run(case, wanted(SEED))
    drawn = _DRAW(SEED, 2 * UNBIASED.k)  # what is drawn stays, what is added to codes does not
    monkeypatch.setattr(oracle, "mix", lambda x: x)
    monkeypatch.setattr(oracle, "draw", lambda seed, count: drawn[:count])
    assert right != cases.run(case, wanted(SEED))
