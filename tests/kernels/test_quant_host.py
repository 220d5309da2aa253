"""The C++ quantisers are the oracle, byte for byte, on every instruction set of this machine."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm.kernels import FLAG_NONFINITE, Spec, host, parse, reference
from hybridcomm.kernels.vectors import NONFINITE
from tests.kernels import cases, quant_cases
from tests.kernels.cases import DIGEST, Case
from tests.kernels.quant_cases import FEW, SPECS

ISAS = host.available_isas()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_encode_equals_the_oracle_at_every_edge(isa: str, spec: Spec) -> None:
    for kind in cases.KINDS:
        for numel in cases.edge_sizes(spec):
            case = Case(spec=spec, kind=kind, numel=numel, seed=7)
            assert not cases.differs(case, partial(host.encode, isa=isa)), case


@settings(deadline=None, max_examples=150)
@given(case=cases.cases(of=quant_cases.specs()), isa=st.sampled_from(ISAS), in_place=st.booleans())
def test_encode_equals_the_oracle(case: Case, isa: str, in_place: bool) -> None:
    oracle = cases.run(case, reference.encode)
    assert cases.run(case, partial(host.encode, isa=isa), in_place=in_place) == oracle
    assert cases.run(case, reference.encode, in_place=in_place) == oracle


@settings(deadline=None, max_examples=60)
@given(
    case=cases.cases(of=quant_cases.specs()),
    isa=st.sampled_from(ISAS),
    decay=st.sampled_from([0.5, 0.9, 0.0, -1.0]),
    feedback=st.booleans(),
)
def test_decay_and_no_feedback_equal_the_oracle(case: Case, isa: str, decay: float, feedback: bool) -> None:
    """A residual that shrinks; and ``e_out=None``, which drops what is not sent."""
    made = []
    for encode in (reference.encode, partial(host.encode, isa=isa)):
        grad, e_in = case.inputs()
        payload = np.zeros(case.spec.nbytes(case.numel), np.uint8)
        e_out = np.zeros(case.numel, np.float32) if feedback else None
        flags = encode(case.spec, grad, e_in, e_out, payload, DIGEST, decay=decay)
        made.append((flags, payload.tobytes(), None if e_out is None else e_out.tobytes()))
    assert made[0] == made[1]


@settings(deadline=None, max_examples=80)
@given(data=st.data(), first=cases.cases(of=quant_cases.specs()), isa=st.sampled_from(ISAS))
def test_decode_equals_the_oracle(data: st.DataObject, first: Case, isa: str) -> None:
    kinds = data.draw(st.lists(st.sampled_from(cases.KINDS), max_size=3))
    weight = data.draw(st.sampled_from([1.0, 0.25, 1 / 3, -1.0, 0.0, 3e38]) | st.floats(-2, 2, width=32))
    others = [Case(spec=first.spec, kind=kind, numel=first.numel, seed=i) for i, kind in enumerate(kinds)]
    payloads = [cases.encoded(case)[1] for case in [first, *others]]
    if data.draw(st.booleans()) and not kinds:
        payloads = []
    start = cases.values("normal", first.numel, 99)[0]
    start[::3] = -0.0
    want, got, fresh, zeros = start.copy(), start.copy(), start.copy(), np.zeros_like(start)
    flags = reference.decode_add(first.spec, payloads, want, weight, DIGEST)
    assert host.decode_add(first.spec, payloads, got, weight, DIGEST, isa=isa) == flags
    assert got.tobytes() == want.tobytes()
    reference.decode_add(first.spec, payloads, zeros, weight, DIGEST)
    assert host.decode(first.spec, payloads, fresh, weight, DIGEST, isa=isa) == flags
    assert fresh.tobytes() == zeros.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spec", FEW, ids=str)
def test_every_16_bit_pattern_equals_the_oracle(isa: str, spec: Spec) -> None:
    """All signs, exponents and leading digits of fp32, each between two others: whatever rounds, rounds alike."""
    high = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    for low in (0x0000, 0x7FFF, 0x8000, 0x8001, 0x1000, 0xF000):
        grad = (high | np.uint32(low)).view(np.float32)
        grad = grad[np.isfinite(grad)]
        results = []
        for encode in (reference.encode, partial(host.encode, isa=isa)):
            payload, rest = np.zeros(spec.nbytes(grad.size), np.uint8), np.zeros_like(grad)
            assert encode(spec, grad, None, rest, payload, DIGEST) == 0
            results.append((payload.tobytes(), rest.tobytes()))
        assert results[0] == results[1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spec", FEW, ids=str)
def test_alignment_does_not_matter(isa: str, spec: Spec) -> None:
    for shift in range(1, 16):
        numel = 64 * 5 + 9
        grad, e_in = cases.values("normal", numel + shift, 5)
        want, rest = np.zeros(spec.nbytes(numel), np.uint8), np.zeros(numel, np.float32)
        reference.encode(spec, grad[shift:], e_in[:-shift], rest, want, DIGEST)
        store, e_out = np.zeros(want.size + shift, np.uint8), np.zeros(numel + shift, np.float32)
        host.encode(spec, grad[shift:], e_in[:-shift], e_out[shift:], store[shift:], DIGEST, isa=isa)
        assert store[shift:].tobytes() == want.tobytes()
        assert e_out[shift:].tobytes() == rest.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spec", FEW, ids=str)
def test_a_region_large_enough_for_streaming_stores(isa: str, spec: Spec) -> None:
    case = Case(spec=spec, kind="drifting scale", numel=(1 << 15) + 77, seed=3)
    assert not cases.differs(case, partial(host.encode, isa=isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["normal", "nan"])
def test_nothing_beyond_the_buffers_is_touched(isa: str, kind: str) -> None:
    for spec in SPECS:
        for numel in cases.edge_sizes(spec):
            grad, e_in = (cases.guarded(a) for a in cases.values(kind, numel, 2))
            e_out, payload = cases.Guarded(4 * numel).floats(), cases.Guarded(spec.nbytes(numel)).bytes
            host.encode(spec, grad, e_in, e_out, payload, DIGEST, isa=isa)
            host.decode_add(spec, [payload], e_out, 1.0, DIGEST, isa=isa)


@pytest.mark.parametrize("spec", FEW, ids=str)
@pytest.mark.parametrize("kind", NONFINITE)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_non_finite_shard_is_flagged_and_loses_nothing(spec: Spec, kind: str, in_place: bool) -> None:
    for isa in ISAS:
        grad, e_in = cases.values(kind, 1000, 4)
        before = e_in.tobytes()
        payload = np.zeros(spec.nbytes(1000), np.uint8)
        e_out = e_in if in_place else np.ones(1000, np.float32)
        assert host.encode(spec, grad, e_in, e_out, payload, DIGEST, isa=isa) == FLAG_NONFINITE
        assert e_out.tobytes() == before
        assert not payload[64:].any()
        out = np.ones(1000, np.float32)
        assert host.decode_add(spec, [payload], out, 0.5, DIGEST, isa=isa) == FLAG_NONFINITE
        assert (out.view(np.uint32) == 0x7FC00000).all()


@pytest.mark.parametrize("spec", FEW, ids=str)
@pytest.mark.parametrize("mode", ["flush denormals", "round up"])
def test_the_threads_floating_point_mode_does_not_matter(spec: Spec, mode: str) -> None:
    torch = pytest.importorskip("torch", reason="torch sets the flush-to-zero mode")
    wanted, inputs = [], []
    for kind in ("denormal", "normal", "half steps"):
        case = Case(spec=spec, kind=kind, numel=1000, seed=6)
        _, payload, rest = cases.encoded(case)
        out = np.zeros(1000, np.float32)
        reference.decode_add(spec, [payload], out, 1 / 3, DIGEST)
        wanted.append((payload.tobytes(), rest.tobytes(), out.tobytes()))
        inputs.append(case.inputs())
    seen: list[Any] = []

    def work(isa: str) -> None:
        libm = ctypes.CDLL("libm.so.6")
        if mode == "round up":
            libm.fesetround(0x800)
        else:
            torch.set_flush_denormal(True)
        for grad, e_in in inputs:
            payload, rest = np.zeros(spec.nbytes(1000), np.uint8), np.zeros(1000, np.float32)
            out = np.zeros(1000, np.float32)
            host.encode(spec, grad, e_in, rest, payload, DIGEST, isa=isa)
            host.decode_add(spec, [payload], out, 1 / 3, DIGEST, isa=isa)
            seen.append((payload.tobytes(), rest.tobytes(), out.tobytes()))
        libm.fesetround(0)

    for isa in ISAS:
        seen.clear()
        cases.in_thread(partial(work, isa))
        assert seen == wanted, isa


@pytest.mark.parametrize("mutant", sorted(quant_cases.MUTANTS))
def test_a_planted_bug_is_caught(mutant: str) -> None:
    with quant_cases.planted(mutant):
        caught = any(_differs(case) for case in cases.corpus(*FEW, parse("sign1")))
    assert caught, "the comparison let a wrong oracle pass"


def _differs(case: Case) -> bool:
    return cases.differs(case, host.encode)
