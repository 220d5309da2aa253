"""Quantised payloads from outside: what no encoder could have written is refused and changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from hybridcomm.kernels import HEADER_NBYTES, Spec, Status, host, parse, reference
from tests.kernels import cases, quant_cases
from tests.kernels.cases import DIGEST, Case
from tests.kernels.test_payload import DECODERS, Decoder, payload_of, put, verdict

NUMEL = 64 * 3 + 21


def codes(text: str) -> int:
    """Where the codes begin."""
    return int(parse(text).codes_offset(NUMEL))


# text, offset, format, a value that no encoder writes, the nearest one that an encoder may write
RECORDS = {
    "fp16 infinity": ("fp16", codes("fp16") + 2, "<H", 0x7C00, 0x7BFF),
    "fp16 negative NaN": ("fp16", codes("fp16") + 2, "<H", 0xFE00, 0xFBFF),
    "fp16 at the end": ("fp16", codes("fp16") + 2 * NUMEL - 2, "<H", 0x7C00, 0),
    "bf16 infinity": ("bf16", codes("bf16"), "<H", 0x7F80, 0x7F7F),
    "bf16 negative infinity": ("bf16", codes("bf16"), "<H", 0xFF80, 0xFF7F),
    "e4m3 above the largest code": ("fp8/g64", codes("fp8/g64") + 9, "<B", 0x78, 0x77),
    "e4m3 NaN": ("fp8/g64", codes("fp8/g64") + 9, "<B", 0xFF, 0xF7),
    "e5m2 above the largest code": ("fp8:e5m2/g64", codes("fp8/g64") + 9, "<B", 0xF8, 0xF7),
    "e4m3 scale of zero": ("fp8/g64", 64, "<B", 0, 1),
    "e4m3 scale too large": ("fp8/g64", 67, "<B", 248, 247),
    "e5m2 scale too large": ("fp8:e5m2/g64", 67, "<B", 241, 240),
    "int8 reserved code": ("int8/g64", codes("int8/g64") + 100, "<B", 0x80, 0x81),
    "int8 scale of zero": ("int8/g64", 64, "<B", 0, 1),
    "int8 scale too large": ("int8/g64", 67, "<B", 249, 248),
    "int4 reserved code below": ("int4/g64", codes("int4/g64") + 9, "<B", 0x18, 0x19),
    "int4 reserved code above": ("int4/g64", codes("int4/g64") + 9, "<B", 0x81, 0x91),
    "int4 after the last": ("int4/g64", codes("int4/g64") + NUMEL // 2, "<B", 0x11, 0x01),
    "int4 scale too large": ("int4/g64", 67, "<B", 253, 252),
    "sign1 denormal scale": ("sign1/g64", 66, "<H", 0x007F, 0x0080),
    "sign1 infinite scale": ("sign1/g64", 66, "<H", 0x7F80, 0x7F7F),
    "sign1 negative scale": ("sign1/g64", 66, "<H", 0xBF80, 0x3F80),
    "sign1 after the last": ("sign1/g64", codes("sign1/g64") + NUMEL // 8, "<B", 0x20, 0x1F),
}


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("record", RECORDS)
def test_what_no_encoder_writes_is_refused(decoder: Decoder, record: str) -> None:
    text, offset, form, wrong, right = RECORDS[record]
    spec, out = parse(text), np.ones(NUMEL, np.float32)
    assert verdict(decoder, put(payload_of(spec, NUMEL), offset, form, right), out.copy(), spec) is Status.OK
    assert verdict(decoder, put(payload_of(spec, NUMEL), offset, form, wrong), out, spec) is Status.BAD_RECORD


@pytest.mark.parametrize("spec", quant_cases.FEW, ids=str)
def test_another_codec_or_layout_is_refused(spec: Spec) -> None:
    for other in quant_cases.FEW:
        if other == spec or other.nbytes(NUMEL) != spec.nbytes(NUMEL):
            continue
        for decoder in DECODERS.values():
            status = verdict(decoder, payload_of(other, NUMEL), np.ones(NUMEL, np.float32), spec)
            assert status in (Status.BAD_HEADER, Status.BAD_LAYOUT)


@pytest.mark.parametrize("spec", quant_cases.FEW, ids=str)
def test_every_flipped_bit_is_noticed(spec: Spec) -> None:
    good, out = payload_of(spec, 21), np.ones(21, np.float32)
    for bit in range(8 * good.size):
        bad = good.copy()
        bad[bit // 8] ^= 1 << bit % 8
        assert verdict(host.decode_add, bad, out, spec) is not Status.OK, f"bit {bit} changed unnoticed"


@settings(deadline=None, max_examples=60)
@given(case=cases.cases(of=quant_cases.specs()))
def test_what_an_encoder_writes_is_accepted(case: Case) -> None:
    """However extreme the values: a decoder that refused them would stop a healthy run."""
    payload = cases.encoded(case)[1]
    assert reference.check(case.spec, payload, case.numel, DIGEST) is Status.OK
    host.decode_add(case.spec, [payload], np.zeros(case.numel, np.float32), 1.0, DIGEST)


# header, then by hand: a spec of each kind on 18 elements or fewer
GOLDEN = {
    "fp16": ([1.5, -65520.0, 2.0**-25, -3.0 * 2.0**-25], "003e fffb 0000 0280 0000000000000000"),
    "bf16": ([1.5, -(1 + 2.0**-8), 1 + 3 * 2.0**-8, -0.0], "c03f 80bf 823f 0080 0000000000000000"),
    "fp8/g16": ([1.0, -1.9375, 1.0625, 2.0**-16], "78" + "00" * 15 + "70 f7 70 01" + "00" * 12),
    "int8/g16": ([1.0, -1.999, 0.5, 2.5 / 64], "79" + "00" * 15 + "40 81 20 02" + "00" * 12),
    "int4/g16": ([1.0, -1.999, 0.125, 0.375, 0.75], "7d" + "00" * 15 + "94 20 03" + "00" * 13),
    "sign1/g16": ([3.0, -1.0, 1.0, -1.0], "c03f" + "00" * 14 + "0a" + "00" * 15),
}


@pytest.mark.parametrize("text", GOLDEN)
def test_version_1_stays_as_it_is(text: str) -> None:
    """Golden bodies: whoever changes a byte of one makes a new version."""
    values, by_hand = GOLDEN[text]
    grad, spec = np.array(values, np.float32), parse(text)
    payload = np.zeros(spec.nbytes(grad.size), np.uint8)
    reference.encode(spec, grad, None, None, payload)
    assert payload[HEADER_NBYTES:].tobytes().hex() == bytes.fromhex(by_hand).hex()
