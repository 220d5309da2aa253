"""gtop1's Triton kernels against the oracle, byte for byte; run by test_triton.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm.kernels import reference
from hybridcomm.kernels.device_codec import jit_codec
from hybridcomm.kernels.oracles import gtop1 as oracle
from hybridcomm.kernels.specs.gtop1 import GTop1Spec
from tests.kernels import cases, sparse_cases
from tests.kernels.cases import Case
from tests.kernels.triton_sparse import encoder, matches_decoding, matches_reencoding
from tests.kernels.triton_sparse import oracle as widened_oracle

SPECS = tuple(sparse_cases.SPECS[text] for text in sparse_cases.TEXTS if text.startswith("gtop1"))
SMALL = GTop1Spec(rows=2, k=16)
encode = encoder()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_encode_equals_the_oracle_at_the_edges(spec: GTop1Spec) -> None:
    sizes = (spec.block + 1, spec.block - 1, 17, 15, 2 * spec.block, 0)
    step = 1 if spec.block < 3200 else 3  # a program of the largest blocks takes long
    for i, kind in enumerate(cases.KINDS[::step]):
        case = Case(spec=spec, kind=kind, numel=sizes[i % 6], seed=7, memoryless=i % 3 == 0)
        assert not cases.differs(case, encode), case


@settings(deadline=None, max_examples=12)
@given(case=cases.cases(blocks=2, of=st.sampled_from(SPECS)), in_place=st.booleans())
def test_encode_equals_the_oracle(case: Case, in_place: bool) -> None:
    assert cases.run(case, encode, in_place=in_place) == cases.run(case, reference.encode)


@pytest.mark.parametrize("grad", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rest", ["fp32", "bf16"])
def test_types_and_decay_equal_the_oracle(grad: str, rest: str) -> None:
    for kind in ("normal", "heavy", "negative zero", "huge", "denormal"):
        case = Case(spec=SMALL, kind=kind, numel=48, seed=3)
        assert cases.run(case, encoder(grad, rest, 0.9)) == cases.run(
            case, widened_oracle(grad, rest, 0.9)
        ), kind


@settings(deadline=None, max_examples=8)
@given(data=st.data(), first=cases.cases(blocks=2, of=st.sampled_from(SPECS)))
def test_decode_equals_the_oracle(data: st.DataObject, first: Case) -> None:
    assert matches_decoding(first, data)


@pytest.mark.parametrize("rest", ["fp32", "bf16"])
@pytest.mark.parametrize("kinds", [("normal", "heavy", "tied"), ("normal", "inf")], ids=["finite", "flagged"])
def test_reencoding_is_decoding_and_encoding(kinds: tuple[str, ...], rest: str) -> None:
    assert matches_reencoding(SPECS[0], 3200 + 48, kinds, rest)


def test_wrong_tensors_are_refused() -> None:
    grad = torch.zeros(48)
    payload = torch.zeros(SMALL.nbytes(48), dtype=torch.uint8)
    with pytest.raises(ValueError, match="float32 or bfloat16 or float16"):
        jit_codec(SMALL).encode(grad.double(), None, None, payload)
    with pytest.raises(ValueError, match="nbytes"):
        jit_codec(SMALL).encode(grad, None, None, payload[:-16])
    with pytest.raises(ValueError, match="one type"):
        jit_codec(SMALL).encode(grad, grad, grad.bfloat16(), payload)
    with pytest.raises(ValueError, match="e_out: float32 or bfloat16"):
        jit_codec(SMALL).reencode(payload[None], 48, None, grad.half(), payload, check=False)


def _ties_to_the_highest_row(acc: cases.Floats) -> oracle.Ints:
    row: oracle.Ints = acc.shape[1] - 1 - oracle.keys(acc)[:, ::-1].argmax(axis=1)
    return row


def _signed_comparison(acc: cases.Floats) -> oracle.Ints:
    row: oracle.Ints = acc.argmax(axis=1)
    return row


def _next_column(acc: cases.Floats) -> oracle.Ints:
    row: oracle.Ints = oracle.keys(acc).argmax(axis=1)
    row[:, 1:] = row[:, :-1].copy()
    return row


@pytest.mark.parametrize("mutant", [_ties_to_the_highest_row, _signed_comparison, _next_column])
def test_a_planted_bug_is_caught(mutant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.truth(SMALL)
    monkeypatch.setattr(oracle, "select", mutant)
    assert cases.differs(cases.told_apart(right), encode)
