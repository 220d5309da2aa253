"""Triton kernels against the oracle, byte for byte; run by test_triton.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm.kernels import PayloadFormatError, Status, TopKSpec, reference
from hybridcomm.kernels.device_codec import jit_codec
from tests.kernels import cases, mutants
from tests.kernels.cases import DIGEST, Case
from tests.kernels.triton_sparse import encoder, matches_decoding, matches_reencoding, oracle

SMALL = [spec for spec in cases.SPECS if spec.block <= 64]
SIGNS = [TopKSpec(block=16, k=3, sign=True), TopKSpec(block=4096, k=41, sign=True)]
MANY = TopKSpec(block=2048, k=2048)
"""More records than a program's lanes can add up in 32 bits."""
FEW = (TopKSpec(block=16, k=1), TopKSpec(block=32, k=12, value_bits=4))


encode = encoder()


def test_the_interpreter_runs() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("spec", [*cases.SPECS, *SIGNS, MANY], ids=str)
def test_encode_equals_the_oracle_at_the_edges(spec: TopKSpec) -> None:
    sizes = (spec.block + 1, spec.block - 1, spec.layout[1] - 1, 0)
    for i, kind in enumerate(
        cases.KINDS
    ):  # every kind, and each size with several of them: a program takes 20 ms
        case = Case(spec=spec, kind=kind, numel=sizes[i % 4], seed=7, memoryless=i % 3 == 0)
        assert not cases.differs(case, encode), case


@settings(deadline=None, max_examples=40)
@given(case=cases.cases(blocks=2), in_place=st.booleans())
def test_encode_equals_the_oracle(case: Case, in_place: bool) -> None:
    assert cases.run(case, encode, in_place=in_place) == cases.run(case, reference.encode)


@pytest.mark.parametrize("grad", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rest", ["fp32", "bf16"])
def test_types_and_decay_equal_the_oracle(grad: str, rest: str) -> None:
    for kind in ("normal", "heavy", "negative zero", "huge", "denormal"):
        case = Case(spec=FEW[1], kind=kind, numel=48, seed=3)
        assert cases.run(case, encoder(grad, rest, 0.9)) == cases.run(case, oracle(grad, rest, 0.9)), kind


@settings(deadline=None, max_examples=20)
@given(data=st.data(), first=cases.cases(blocks=2))
def test_decode_equals_the_oracle(data: st.DataObject, first: Case) -> None:
    assert matches_decoding(first, data)


@pytest.mark.parametrize("spec", [TopKSpec(), SIGNS[0]], ids=str)
@pytest.mark.parametrize("rest", ["fp32", "bf16"])
@pytest.mark.parametrize("kinds", [("normal", "heavy", "tied"), ("normal", "inf")], ids=["finite", "flagged"])
def test_reencoding_is_decoding_and_encoding(kinds: tuple[str, ...], spec: TopKSpec, rest: str) -> None:
    assert matches_reencoding(spec, spec.block + 48, kinds, rest)


def test_a_damaged_payload_is_refused() -> None:
    case = Case(spec=SMALL[0], kind="normal", numel=40, seed=1)
    payloads = torch.from_numpy(np.stack([cases.encoded(case)[1]] * 2))
    payloads[1, 64] += 1
    out = torch.ones(40)
    with pytest.raises(PayloadFormatError) as refusal:
        jit_codec(case.spec).decode_add(payloads, out, 1.0, DIGEST)
    assert (refusal.value.status, refusal.value.index) == (Status.BAD_CHECKSUM, 1)
    assert bool((out == 1).all())


def test_wrong_tensors_are_refused() -> None:
    spec, grad = SMALL[0], torch.zeros(40)
    payload = torch.zeros(spec.nbytes(40), dtype=torch.uint8)
    with pytest.raises(ValueError, match="float32"):
        jit_codec(spec).encode(grad.double(), None, None, payload)
    with pytest.raises(ValueError, match="nbytes"):
        jit_codec(spec).encode(grad, None, None, payload[:-16])
    with pytest.raises(ValueError, match="as many"):
        jit_codec(spec).encode(grad, grad[1:], None, payload)
    with pytest.raises(ValueError, match="alignment"):
        jit_codec(spec).encode(grad, None, None, torch.zeros(payload.numel() + 1, dtype=torch.uint8)[1:])


# The host wrapper takes the header from the oracle, so a wrong header would be wrong on both sides.
@pytest.mark.parametrize("mutant", sorted(set(mutants.MUTANTS) - {"numel off by one"}))
def test_a_planted_bug_is_caught(mutant: str) -> None:
    right = cases.truth(*FEW)
    with mutants.planted(mutant):
        assert cases.differs(cases.told_apart(right), encode)
