"""The sparse and low-rank codecs in C++ are their oracles, byte for byte, on every instruction set."""

from __future__ import annotations

import struct
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm.kernels import FLAG_NONFINITE, PayloadFormatError, Status, host, reference
from hybridcomm.kernels.spec import parse
from hybridcomm.kernels.vectors import NONFINITE
from tests.kernels import cases, sparse_cases
from tests.kernels.cases import DIGEST, Bytes, Case
from tests.kernels.sparse_cases import ISAS, SPECS, TEXTS, any_case, case, encoder


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_reads_back(text: str) -> None:
    assert parse(str(SPECS[text])) == SPECS[text]


@pytest.mark.parametrize("text", TEXTS)
def test_encode_equals_the_oracle_at_every_edge(text: str) -> None:
    spec = SPECS[text]
    for kind in cases.KINDS:
        for numel in sparse_cases.sizes(spec):
            one = case(spec, kind, numel)
            want = cases.run(one, encoder())
            for isa in ISAS:
                assert cases.run(one, encoder(isa)) == want, (one, isa)


@settings(deadline=None, max_examples=150)
@given(one=any_case(), isa=st.sampled_from(ISAS), decay=st.sampled_from([1.0, 0.9]), in_place=st.booleans())
def test_encode_equals_the_oracle(one: Case, isa: str, decay: float, in_place: bool) -> None:
    want = cases.run(one, encoder(decay=decay))
    assert cases.run(one, encoder(isa, decay=decay), in_place=in_place) == want


@settings(deadline=None, max_examples=60)
@given(one=any_case(), isa=st.sampled_from(ISAS))
def test_a_dropped_rest_changes_no_byte(one: Case, isa: str) -> None:
    grad, e_in = one.inputs()
    made = np.full(one.spec.nbytes(one.numel), 0xA5, np.uint8)
    encoder(isa)(one.spec, grad, e_in, None, made, DIGEST)
    assert made.tobytes() == cases.run(one, encoder())[1]


def payload_of(one: Case) -> Bytes:
    return np.frombuffer(cases.run(one, encoder())[1], np.uint8).copy()


@settings(deadline=None, max_examples=100)
@given(data=st.data(), first=any_case(), isa=st.sampled_from(ISAS))
def test_decode_equals_the_oracle(data: st.DataObject, first: Case, isa: str) -> None:
    kinds = data.draw(st.lists(st.sampled_from(cases.KINDS), max_size=2))
    weight = data.draw(st.sampled_from([1.0, 0.25, 1 / 3, -1.0, 0.0]))
    others = [case(first.spec, kind, first.numel, seed=i) for i, kind in enumerate(kinds)]
    payloads = [payload_of(one) for one in [first, *others]]
    start = cases.values("normal", first.numel, 99)[0]
    start[::3] = -0.0
    want, got, fresh, zeros = start.copy(), start.copy(), start.copy(), np.zeros_like(start)
    flags = reference.decode_add(first.spec, payloads, want, weight, DIGEST)
    assert host.decode_add(first.spec, payloads, got, weight, DIGEST, isa=isa) == flags
    assert got.tobytes() == want.tobytes()
    reference.decode_add(first.spec, payloads, zeros, weight, DIGEST)
    assert host.decode(first.spec, payloads, fresh, weight, DIGEST, isa=isa) == flags
    assert fresh.tobytes() == zeros.tobytes()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("isa", ISAS)
def test_no_buffer_needs_an_alignment_and_nothing_beyond_is_touched(isa: str, text: str) -> None:
    spec = SPECS[text]
    for shift, numel in enumerate(sparse_cases.sizes(spec), start=1):
        grad, e_in = cases.values("normal", numel, 5)
        want = cases.run(case(spec, "normal", numel, seed=5), encoder())
        near = [cases.guarded(a) for a in (grad, e_in, np.zeros(numel, np.float32))]
        store = cases.Guarded(spec.nbytes(numel) + shift % 16).bytes[shift % 16 :]
        flags = encoder(isa)(spec, near[0], near[1], near[2], store, DIGEST)
        assert (flags, store.tobytes(), near[2].tobytes()) == want
        host.decode_add(spec, [store], near[2], 1.0, DIGEST, isa=isa)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", NONFINITE)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_non_finite_region_is_flagged_and_loses_nothing(
    isa: str, text: str, kind: str, in_place: bool
) -> None:
    spec = SPECS[text]
    numel = spec.block + 5
    grad, e_in = cases.values(kind, numel, 4)
    before = e_in.tobytes()
    payload, e_out = np.zeros(spec.nbytes(numel), np.uint8), e_in if in_place else np.ones(numel, np.float32)
    assert encoder(isa)(spec, grad, e_in, e_out, payload, DIGEST) == FLAG_NONFINITE
    assert e_out.tobytes() == before
    assert not payload[64:].any()
    out = np.ones(numel, np.float32)
    assert host.decode_add(spec, [payload], out, 0.5, DIGEST, isa=isa) == FLAG_NONFINITE
    assert (out.view(np.uint32) == 0x7FC00000).all()


@settings(deadline=None, max_examples=150)
@given(data=st.data(), isa=st.sampled_from(ISAS), one=any_case(kinds=("normal",)), sealed=st.booleans())
def test_random_damage_never_harms(data: st.DataObject, isa: str, one: Case, sealed: bool) -> None:
    """Decoders and oracle agree on what is refused; what passes leaves finite values inside the region."""
    bad = payload_of(one)
    start = data.draw(st.sampled_from([0, 64])) if bad.size > 64 else 0
    for _ in range(data.draw(st.integers(1, 8))):
        bad[data.draw(st.integers(start, bad.size - 1))] = data.draw(st.integers(0, 255))
    if sealed:
        bad[48:56] = np.frombuffer(struct.pack("<Q", reference.checksum(bad)), np.uint8)
    out = cases.guarded(np.ones(one.numel, np.float32)).view(np.float32)
    mine, seen = np.ones(one.numel, np.float32), []
    for decode, target in ((partial(host.decode_add, isa=isa), out), (reference.decode_add, mine)):
        try:
            decode(one.spec, [cases.guarded(bad)], target, 1.0, DIGEST)
            seen.append(Status.OK)
        except PayloadFormatError as refusal:
            seen.append(refusal.status)
    assert seen[0] is seen[1]
    assert out.tobytes() == mine.tobytes()
    assert np.isfinite(out).all() or (seen[0] is Status.OK and bool(bad[40] & 1))


@pytest.mark.parametrize("text", TEXTS)
def test_every_flipped_bit_of_the_body_is_noticed(text: str) -> None:
    spec = SPECS[text]
    good = payload_of(case(spec, "normal", min(spec.block, 64) + 3))
    for bit in range(8 * 64, 8 * good.size, 1 if good.size < 300 else 37):
        bad = good.copy()
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PayloadFormatError):
            host.decode_add(spec, [bad], np.ones(min(spec.block, 64) + 3, np.float32), 1.0, DIGEST)


@pytest.mark.parametrize("text", [text for text in TEXTS if text.split(":")[0] in ("topk", "gtop1", "gtopk")])
@pytest.mark.parametrize("isa", ISAS)
def test_a_region_large_enough_for_streaming_stores(isa: str, text: str) -> None:
    one = case(SPECS[text], "drifting scale", (1 << 16) + 77, seed=3)
    assert cases.run(one, encoder(isa)) == cases.run(one, encoder())
