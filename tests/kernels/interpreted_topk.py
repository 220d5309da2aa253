"""Triton kernels against the oracle, byte for byte; run by test_topk_triton.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm.kernels import PayloadFormatError, Status, TopKSpec, reference
from hybridcomm.kernels.triton import topk
from tests.kernels import cases, mutants
from tests.kernels.cases import DIGEST, Bytes, Case, Floats

SMALL = [spec for spec in cases.SPECS if spec.block <= 64]
FEW = (TopKSpec(block=16, k=1), TopKSpec(block=32, k=12, value_bits=4))


def encode(
    spec: TopKSpec, grad: Floats, e_in: Floats | None, e_out: Floats | None, payload: Bytes, digest: int
) -> int:
    """The Triton encoder behind the oracle's interface."""
    bytes_ = torch.zeros(payload.size, dtype=torch.uint8) + 0xA5
    source = None if e_in is None else torch.from_numpy(e_in)
    rest = None if e_out is None else source if e_out is e_in else torch.from_numpy(e_out)
    topk.encode(spec, torch.from_numpy(grad), source, rest, bytes_, digest)
    payload[:] = bytes_.numpy()
    return int(payload[40])


def test_the_interpreter_runs() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("spec", cases.SPECS, ids=str)
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


@settings(deadline=None, max_examples=30)
@given(data=st.data(), first=cases.cases(blocks=2))
def test_decode_equals_the_oracle(data: st.DataObject, first: Case) -> None:
    kinds = data.draw(st.lists(st.sampled_from(cases.KINDS), max_size=2))
    weight = data.draw(st.sampled_from([1.0, 0.25, float(np.float32(1 / 3)), -1.0]))
    others = [Case(spec=first.spec, kind=kind, numel=first.numel, seed=i) for i, kind in enumerate(kinds)]
    payloads = np.stack([cases.encoded(case)[1] for case in [first, *others]])
    want = cases.values("normal", first.numel, 99)[0]
    want[::3] = -0.0
    got = torch.from_numpy(want.copy())
    reference.decode_add(first.spec, list(payloads), want, weight, DIGEST)
    topk.decode_add(first.spec, torch.from_numpy(payloads), got, weight, DIGEST)
    assert got.numpy().tobytes() == want.tobytes()


def test_a_damaged_payload_is_refused() -> None:
    case = Case(spec=SMALL[0], kind="normal", numel=40, seed=1)
    payloads = torch.from_numpy(np.stack([cases.encoded(case)[1]] * 2))
    payloads[1, 64] += 1
    out = torch.ones(40)
    with pytest.raises(PayloadFormatError) as refusal:
        topk.decode_add(case.spec, payloads, out, 1.0, DIGEST)
    assert (refusal.value.status, refusal.value.index) == (Status.BAD_CHECKSUM, 1)
    assert bool((out == 1).all())


def test_wrong_tensors_are_refused() -> None:
    spec, grad = SMALL[0], torch.zeros(40)
    payload = torch.zeros(spec.nbytes(40), dtype=torch.uint8)
    with pytest.raises(ValueError, match="float32"):
        topk.encode(spec, grad.double(), None, None, payload)
    with pytest.raises(ValueError, match="nbytes"):
        topk.encode(spec, grad, None, None, payload[:-16])
    with pytest.raises(ValueError, match="as many"):
        topk.encode(spec, grad, grad[1:], None, payload)
    with pytest.raises(ValueError, match="alignment"):
        topk.encode(spec, grad, None, None, torch.zeros(payload.numel() + 1, dtype=torch.uint8)[1:])


# The host wrapper takes the header from the oracle, so a wrong header would be wrong on both sides.
@pytest.mark.parametrize("mutant", sorted(set(mutants.MUTANTS) - {"numel off by one"}))
def test_a_planted_bug_is_caught(mutant: str) -> None:
    with mutants.planted(mutant):
        assert any(cases.differs(case, encode) for case in cases.corpus(*FEW))
