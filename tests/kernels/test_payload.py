"""Bytes from outside: a payload that no encoder could have written is refused by name and changes nothing."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm.kernels import (
    HEADER_NBYTES,
    PayloadFormatError,
    Spec,
    SpecError,
    Status,
    TopKSpec,
    host,
    reference,
)
from tests.kernels import cases, quant_cases
from tests.kernels.cases import DIGEST, Bytes, Case, Floats

SPEC = TopKSpec(block=64, k=5)
NUMEL = 64 * 3 + 20
DECODERS = {
    "oracle": reference.decode_add,
    **{isa: partial(host.decode_add, isa=isa) for isa in host.available_isas()},
}
Decoder = Callable[..., int]


def payload_of(spec: Spec = SPEC, numel: int = NUMEL) -> Bytes:
    return cases.encoded(Case(spec=spec, kind="normal", numel=numel, seed=5))[1]


def put(payload: Bytes, offset: int, form: str, value: int, *, seal: bool = True) -> Bytes:
    """A copy with one field changed; sealed: with a checksum that matches again."""
    changed = payload.copy()
    changed[offset : offset + struct.calcsize(form)] = np.frombuffer(struct.pack(form, value), np.uint8)
    if seal:
        changed[48:56] = np.frombuffer(struct.pack("<Q", reference.checksum(changed)), np.uint8)
    return changed


def verdict(decoder: Decoder, payload: Bytes, out: Floats, spec: Spec = SPEC) -> Status:
    """What the decoder says; and that it wrote nothing when it refused."""
    before = out.tobytes()
    good = payload_of(spec, out.size)
    try:
        decoder(spec, [good, cases.guarded(payload)], out, 1.0, DIGEST)
    except PayloadFormatError as refusal:
        error = refusal
    else:
        return Status.OK
    assert out.tobytes() == before
    assert error.index == 1
    assert error.status.name.lower() in str(error)
    return error.status


FIELDS = {
    "magic": (0, "<I", 0x4C504349, Status.BAD_HEADER),
    "version": (4, "<H", 2, Status.BAD_HEADER),
    "codec": (6, "<B", 2, Status.BAD_HEADER),
    "value_bits": (7, "<B", 9, Status.BAD_LAYOUT),
    "block": (8, "<I", 128, Status.BAD_LAYOUT),
    "k": (12, "<I", 6, Status.BAD_LAYOUT),
    "numel": (16, "<Q", NUMEL + 1, Status.BAD_NUMEL),
    "nbytes": (24, "<Q", 1 << 62, Status.BAD_NBYTES),
    "digest": (32, "<Q", DIGEST ^ 1, Status.BAD_DIGEST),
    "unknown flag": (40, "<I", 2, Status.BAD_HEADER),
    "variant": (44, "<B", 1, Status.BAD_LAYOUT),
    "reserved": (45, "<B", 1, Status.BAD_HEADER),
    "seed": (56, "<Q", 1 << 63, Status.BAD_HEADER),
    "scale of zero": (64, "<B", 0, Status.BAD_RECORD),
    "scale of infinity": (64, "<B", 255, Status.BAD_RECORD),
    "scale that could overflow": (64, "<B", SPEC.max_scale + 1, Status.BAD_RECORD),
    "index past the end": (SPEC.records_offset(NUMEL) + 2 * 5 * 3, "<H", 20, Status.BAD_RECORD),
}


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("field", FIELDS)
def test_each_wrong_field_is_named(decoder: Decoder, field: str) -> None:
    offset, form, value, status = FIELDS[field]
    out = np.ones(NUMEL, np.float32)
    assert verdict(decoder, payload_of(), out.copy()) is Status.OK
    assert verdict(decoder, put(payload_of(), offset, form, value), out) is status


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_every_flipped_bit_is_noticed(decoder: Decoder) -> None:
    good, out = payload_of(), np.ones(NUMEL, np.float32)
    for bit in range(8 * good.size):
        bad = good.copy()
        bad[bit // 8] ^= 1 << bit % 8
        assert verdict(decoder, bad, out) is not Status.OK, f"bit {bit} changed unnoticed"


@pytest.mark.parametrize("specs", [cases.specs(), quant_cases.specs()], ids=["topk", "quant"])
@settings(deadline=None, max_examples=150)
@given(data=st.data(), decoder=st.sampled_from(list(DECODERS.values())), seal=st.booleans())
def test_random_damage_never_harms(
    data: st.DataObject, specs: st.SearchStrategy[Spec], decoder: Decoder, seal: bool
) -> None:
    spec = data.draw(specs)
    numel = data.draw(st.sampled_from(cases.edge_sizes(spec)))
    bad = payload_of(spec, numel)
    start = data.draw(st.sampled_from([0, HEADER_NBYTES])) if bad.size > HEADER_NBYTES else 0
    for _ in range(data.draw(st.integers(1, 8))):
        bad[data.draw(st.integers(start, bad.size - 1))] = data.draw(st.integers(0, 255))
    if seal:
        bad = put(bad, 48, "<Q", 0)
    out = cases.guarded(np.ones(numel, np.float32)).view(np.float32)
    status = verdict(decoder, bad, out, spec)
    mine = np.ones(numel, np.float32)
    assert status is verdict(reference.decode_add, bad, mine, spec)
    assert out.tobytes() == mine.tobytes()
    assert np.isfinite(out).all() or status is Status.OK


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, -16, -1])
def test_a_truncated_payload_is_refused(decoder: Decoder, length: int) -> None:
    out = np.ones(NUMEL, np.float32)
    with pytest.raises(PayloadFormatError) as refusal:
        decoder(SPEC, [payload_of()[:length]], out, 1.0, DIGEST)
    assert refusal.value.status is Status.BAD_NBYTES
    assert (out == 1).all()


def test_version_1_stays_as_it_is() -> None:
    """A golden payload: whoever changes a byte of it makes a new version."""
    grad = np.array([0.5, -3.0, 0.25, 3.0, -7.75, 0.0, 1.0, -0.0] * 2 + [2.0, -1.0], np.float32)
    spec = TopKSpec(block=16, k=3, value_bits=6)
    payload, e_out = np.zeros(spec.nbytes(18), np.uint8), np.zeros(18, np.float32)
    reference.encode(spec, grad, None, e_out, payload, 0x0123456789ABCDEF)
    by_hand = (
        "4843504c 0100 01 06 10000000 03000000 1200000000000000 6000000000000000"
        "efcdab8967452301 00000000 00000000 2d076d7d29000000 0000000000000000"
        "7d 7c 0000000000000000000000000000"  # scales 1/4 (largest 7.75) and 1/8 (largest 2)
        "01d0 0484 0c84"  # -12 at 1, the first of four threes; -31 at 4 and at 12
        "0040 01e0 0000 00000000"  # 16 at 0; -8 at 1; padding
    )
    assert payload.tobytes() == bytes.fromhex(by_hand)
    assert e_out[[1, 3, 4, 16, 17]].tolist() == [0.0, 3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"block": 1000}, "power of two"),
        ({"block": 8}, "16 to 4096"),
        ({"block": 8192}, "16 to 4096"),
        ({"ratio": 0.0}, "ratio=0.0"),
        ({"ratio": 1.5}, "ratio=1.5"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"k": 0}, "k=0"),
        ({"k": 1025}, "k=1025"),
        ({"ratio": 0.5, "k": 3}, "one of the two"),
        ({"value_bits": 2}, "3 to"),
        ({"value_bits": 7, "block": 1024}, "3 to 6"),
    ],
)
def test_an_impossible_spec_is_refused(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        TopKSpec(**arguments)


@settings(deadline=None)
@given(spec=cases.specs())
def test_the_text_of_a_spec_reads_back(spec: TopKSpec) -> None:
    assert TopKSpec.parse(str(spec)) == spec


@pytest.mark.parametrize("text", ["", "top", "topk:", "topk:x", "topk:0.01/k", "topk:0.01 ", "topk/b-1"])
def test_a_malformed_text_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="write topk"):
        TopKSpec.parse(text)


def test_ratio_means_records_per_block() -> None:
    assert TopKSpec() == TopKSpec(ratio=0.01)
    assert TopKSpec(ratio=0.01, block=1024).layout == (1024, 10, 6)
    assert TopKSpec(ratio=1e-9, block=64).layout == (64, 1, 10)
    assert TopKSpec(ratio=1.0, block=4096).layout == (4096, 4096, 4)
