"""The C++ kernels are the oracle, byte for byte, on every instruction set of this machine."""

from __future__ import annotations

import ctypes
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm.kernels import FLAG_NONFINITE, TopKSpec, host, reference
from hybridcomm.kernels.vectors import NONFINITE
from tests.kernels import cases, mutants
from tests.kernels.cases import DIGEST, Case

ISAS = host.available_isas()


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_this_machine_has_the_instruction_set(isa: str) -> None:
    if isa not in ISAS:
        pytest.skip(f"this processor lacks {isa}: its kernels are not tested here")
    host.set_isa(isa)
    try:
        assert host.active_isa() == isa
    finally:
        host.set_isa(None)
    assert host.active_isa() == ISAS[-1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spec", cases.SPECS, ids=str)
def test_encode_equals_the_oracle_at_every_edge(isa: str, spec: TopKSpec) -> None:
    for kind in cases.KINDS:
        for numel in cases.edge_sizes(spec):
            case = Case(spec=spec, kind=kind, numel=numel, seed=7)
            assert not cases.differs(case, partial(host.encode, isa=isa)), case


@settings(deadline=None, max_examples=200)
@given(case=cases.cases(), isa=st.sampled_from(ISAS), in_place=st.booleans())
def test_encode_equals_the_oracle(case: Case, isa: str, in_place: bool) -> None:
    oracle = cases.run(case, reference.encode)
    assert cases.run(case, partial(host.encode, isa=isa), in_place=in_place) == oracle
    assert cases.run(case, reference.encode, in_place=in_place) == oracle


@settings(deadline=None, max_examples=100)
@given(data=st.data(), first=cases.cases(), isa=st.sampled_from(ISAS))
def test_decode_equals_the_oracle(data: st.DataObject, first: Case, isa: str) -> None:
    kinds = data.draw(st.lists(st.sampled_from(cases.KINDS), max_size=3))
    weight = data.draw(st.sampled_from([1.0, 0.25, 1 / 3, -1.0, 0.0, 3e38]) | st.floats(-2, 2, width=32))
    others = [Case(spec=first.spec, kind=kind, numel=first.numel, seed=i) for i, kind in enumerate(kinds)]
    payloads = [cases.encoded(case)[1] for case in [first, *others]]
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
@pytest.mark.parametrize("shift", range(1, 16))
def test_alignment_does_not_matter(isa: str, shift: int) -> None:
    spec = TopKSpec(block=64, k=3)
    numel = 64 * 5 + 9
    grad, e_in = cases.values("normal", numel + shift, 5)
    want, rest = np.zeros(spec.nbytes(numel), np.uint8), np.zeros(numel, np.float32)
    reference.encode(spec, grad[shift:], e_in[:-shift], rest, want, DIGEST)
    store = np.zeros(want.size + shift, np.uint8)
    e_out = np.zeros(numel + shift, np.float32)
    host.encode(spec, grad[shift:], e_in[:-shift], e_out[shift:], store[shift:], DIGEST, isa=isa)
    assert store[shift:].tobytes() == want.tobytes()
    assert e_out[shift:].tobytes() == rest.tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_a_region_large_enough_for_streaming_stores(isa: str) -> None:
    case = Case(spec=TopKSpec(), kind="drifting scale", numel=(1 << 17) + 77, seed=3)
    assert not cases.differs(case, partial(host.encode, isa=isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["normal", "nan"])
def test_nothing_beyond_the_buffers_is_touched(isa: str, kind: str) -> None:
    for spec in cases.SPECS:
        for numel in cases.edge_sizes(spec):
            grad, e_in = (cases.guarded(a) for a in cases.values(kind, numel, 2))
            e_out, payload = cases.Guarded(4 * numel).floats(), cases.Guarded(spec.nbytes(numel)).bytes
            host.encode(spec, grad, e_in, e_out, payload, DIGEST, isa=isa)
            host.decode_add(spec, [payload], e_out, 1.0, DIGEST, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", NONFINITE)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_non_finite_shard_is_flagged_and_loses_nothing(isa: str, kind: str, in_place: bool) -> None:
    spec = TopKSpec(block=64, k=3)
    grad, e_in = cases.values(kind, 1000, 4)
    before = e_in.tobytes()
    payload, e_out = np.zeros(spec.nbytes(1000), np.uint8), e_in if in_place else np.ones(1000, np.float32)
    assert host.encode(spec, grad, e_in, e_out, payload, DIGEST, isa=isa) == FLAG_NONFINITE
    assert e_out.tobytes() == before
    assert not payload[64:].any()
    out = np.ones(1000, np.float32)
    assert host.decode_add(spec, [payload], out, 0.5, DIGEST, isa=isa) == FLAG_NONFINITE
    assert (out.view(np.uint32) == 0x7FC00000).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["flush denormals", "round up"])
def test_the_threads_floating_point_mode_does_not_matter(isa: str, mode: str) -> None:
    torch = pytest.importorskip("torch", reason="torch sets the flush-to-zero mode")
    case = Case(spec=TopKSpec(block=64, k=9), kind="denormal", numel=1000, seed=6)
    third = Case(spec=case.spec, kind="normal", numel=1000, seed=6)
    payload = cases.encoded(third)[1]
    decoded = np.zeros(1000, np.float32)
    reference.decode_add(case.spec, [payload], decoded, 1 / 3, DIGEST)
    want = cases.run(case, reference.encode), cases.run(third, reference.encode), decoded.tobytes()
    inputs = [(c, *c.inputs()) for c in (case, third)]
    seen: list[bool] = []

    def work() -> None:
        results, out = [], np.zeros(1000, np.float32)
        libm = ctypes.CDLL("libm.so.6")
        if mode == "round up":
            libm.fesetround(0x800)
        else:
            torch.set_flush_denormal(True)
        for c, grad, e_in in inputs:
            rest, made = np.zeros(1000, np.float32), np.zeros(payload.size, np.uint8)
            flags = host.encode(c.spec, grad, e_in, rest, made, DIGEST, isa=isa)
            results.append((flags, made.tobytes(), rest.tobytes()))
        host.decode_add(case.spec, [payload], out, 1 / 3, DIGEST, isa=isa)
        kept = (
            libm.fegetround() == 0x800
            if mode == "round up"
            else bool((inputs[0][1] + inputs[0][1] == 0).all())
        )
        libm.fesetround(0)
        seen.extend([(*results, out.tobytes()) == want, kept])

    cases.in_thread(work)
    assert seen == [True, True], "result unchanged, and the caller's own mode restored"


@pytest.mark.parametrize("mutant", sorted(mutants.MUTANTS))
def test_a_planted_bug_is_caught(mutant: str) -> None:
    with mutants.planted(mutant):
        caught = sum(cases.differs(case, host.encode) for case in cases.corpus())
    assert caught > 0, "the comparison let a wrong oracle pass"


def test_a_planted_decoder_bug_is_caught() -> None:
    case = Case(spec=TopKSpec(block=64, k=3), kind="normal", numel=640, seed=1)
    payload = cases.encoded(case)[1]
    sums = np.zeros((2, 640), np.float32)
    reference.decode_add(case.spec, [payload], sums[0], 1 / 3, DIGEST)
    host.decode_add(case.spec, [payload], sums[1], math.nextafter(np.float32(1 / 3), 1) + 2**-25, DIGEST)
    assert sums[0].tobytes() != sums[1].tobytes()


@pytest.mark.parametrize("isa", ["sse9", ""])
def test_an_unknown_instruction_set_is_refused(isa: str) -> None:
    with pytest.raises(ValueError, match="available_isas"):
        host.set_isa(isa)


def test_wrong_buffers_are_refused() -> None:
    spec = TopKSpec(block=64, k=3)
    grad, payload = np.zeros(128, np.float32), np.zeros(spec.nbytes(128), np.uint8)
    rest = np.zeros(128, np.float32)
    with pytest.raises(ValueError, match="nbytes"):
        host.encode(spec, grad, None, rest, payload[:-1], 0)
    with pytest.raises(ValueError, match="e_in"):
        host.encode(spec, grad, rest[:-1], rest, payload, 0)
    with pytest.raises(ValueError, match="overlaps grad"):
        host.encode(spec, grad, None, grad, payload, 0)
    shared = np.zeros(129, np.float32)
    with pytest.raises(ValueError, match="without being it"):
        host.encode(spec, grad, shared[:-1], shared[1:], payload, 0)
    with pytest.raises(TypeError):
        host.encode(spec, grad.astype(np.float64), None, rest, payload, 0)
    with pytest.raises(TypeError):
        host.encode(spec, np.zeros(256, np.float32)[::2], None, rest, payload, 0)
