"""Triton kernels of the quantising codecs against the oracle, byte for byte, under TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm.kernels import PayloadFormatError, Spec, Status, parse, reference
from hybridcomm.kernels.device_codec import jit_codec
from hybridcomm.kernels.device_tensors import make_header
from tests.kernels import cases, quant_cases
from tests.kernels.cases import DIGEST, Bytes, Case, Floats

FEW = tuple(
    parse(text) for text in ("fp16", "bf16", "fp8/g16", "fp8:e5m2/g16", "int8", "int4/g16", "sign1/g16")
)
DEFAULTS = tuple(parse(text) for text in ("fp16", "bf16", "fp8", "int8", "int4", "sign1"))
TILE = 2048


def encode(
    spec: Any,
    grad: Floats,
    e_in: Floats | None,
    e_out: Floats | None,
    payload: Bytes,
    digest: int,
    **options: float,
) -> int:
    """The Triton encoder behind the oracle's interface."""
    bytes_ = torch.full((payload.size,), 0xA5, dtype=torch.uint8)
    source = None if e_in is None else torch.from_numpy(e_in)
    rest = None if e_out is None else source if e_out is e_in else torch.from_numpy(e_out)
    jit_codec(spec).encode(torch.from_numpy(grad), source, rest, bytes_, digest, **options)
    payload[:] = bytes_.numpy()
    return int(payload[40])


def test_the_interpreter_runs() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("spec", quant_cases.SPECS, ids=str)
def test_encode_equals_the_oracle_at_the_edges(spec: Spec) -> None:
    sizes = (spec.block + 1, spec.block - 1, TILE, 1, TILE + 33)
    for i, kind in enumerate(cases.KINDS):  # every kind, and each size with several of them
        case = Case(spec=spec, kind=kind, numel=sizes[i % 5], seed=7, memoryless=i % 3 == 0)
        assert not cases.differs(case, encode), case


@settings(deadline=None, max_examples=40)
@given(case=cases.cases(of=quant_cases.specs(), blocks=2), in_place=st.booleans())
def test_encode_equals_the_oracle(case: Case, in_place: bool) -> None:
    assert cases.run(case, encode, in_place=in_place) == cases.run(case, reference.encode)


@pytest.mark.parametrize("spec", FEW, ids=str)
@pytest.mark.parametrize("feedback", [True, False])
def test_decay_and_no_feedback_equal_the_oracle(spec: Spec, feedback: bool) -> None:
    for decay in (0.9, -1.0):
        made = []
        for encoder in (reference.encode, encode):
            grad, e_in = cases.values("normal", 300, 3)
            payload = np.zeros(spec.nbytes(300), np.uint8)
            e_out = np.zeros(300, np.float32) if feedback else None
            encoder(spec, grad, e_in, e_out, payload, DIGEST, decay=decay)
            made.append((payload.tobytes(), None if e_out is None else e_out.tobytes()))
        assert made[0] == made[1]


@pytest.mark.parametrize("spec", FEW, ids=str)
def test_every_exponent_and_tie_equals_the_oracle(spec: Spec) -> None:
    """All signs, exponents and three leading digits of fp32, each on and next to what lies between two codes."""
    high = np.arange(1 << 12, dtype=np.uint32) << np.uint32(20)
    low = np.array([0x00000, 0x7FFFF, 0x80000, 0x80001], np.uint32)
    grad = (high[:, None] | low).reshape(-1).view(np.float32)
    grad = np.ascontiguousarray(grad[np.isfinite(grad)])
    made = []
    for encoder in (reference.encode, encode):
        payload, rest = np.zeros(spec.nbytes(grad.size), np.uint8), np.zeros_like(grad)
        encoder(spec, grad, None, rest, payload, DIGEST)
        made.append((payload.tobytes(), rest.tobytes()))
    assert made[0] == made[1]


def narrow(values: Floats) -> Floats:
    """fp32 to bf16 and back, half to even, never from finite to infinite: docs/payload.md."""
    bits = values.view(np.uint32)
    size = bits & np.uint32(0x7FFFFFFF)
    rounded = (size + np.uint32(0x7FFF) + ((size >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return (np.minimum(rounded, np.uint32(0x7F7F0000)) | (bits & np.uint32(0x80000000))).view(np.float32)


@pytest.mark.parametrize("spec", DEFAULTS, ids=str)
@pytest.mark.parametrize("grads", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rests", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_types_are_widened_and_rests_narrowed(
    spec: Spec, grads: torch.dtype, rests: torch.dtype
) -> None:
    numel = TILE + 50
    kinds = ("huge", "heavy", "nan")
    turn = (grads.itemsize + rests.itemsize) // 2 + DEFAULTS.index(
        spec
    )  # each kind with every codec and every pair
    for kind in (kinds[turn % 3],):
        made = [torch.from_numpy(a) for a in cases.values(kind, numel, 5)]
        grad = made[0].clamp(-6e4, 6e4).to(grads) if kind != "nan" else made[0].to(grads)
        e_in = torch.from_numpy(narrow(made[1].numpy())).to(rests)
        wide = e_in.float().numpy()
        want, rest = np.zeros(spec.nbytes(numel), np.uint8), np.zeros(numel, np.float32)
        flags = reference.encode(spec, grad.float().numpy(), wide, rest, want, DIGEST)
        if rests == torch.bfloat16 and not flags:
            rest = narrow(rest)
        payload, e_out = torch.zeros(want.size, dtype=torch.uint8), torch.ones(numel, dtype=rests)
        jit_codec(spec).encode(grad, e_in, e_out, payload, DIGEST)
        assert payload.numpy().tobytes() == want.tobytes(), kind
        assert e_out.float().numpy().tobytes() == rest.tobytes(), kind


def payloads_of(spec: Any, kinds: tuple[str, ...], numel: int) -> Bytes:
    return np.stack(
        [cases.encoded(Case(spec=spec, kind=k, numel=numel, seed=i))[1] for i, k in enumerate(kinds)]
    )


SUMS = (("normal", "heavy", "tied"), ("negative zero",), ("normal", "nan"), ("denormal", "huge"))


@pytest.mark.parametrize("spec", [*FEW, parse("sign1"), parse("int8/g4096")], ids=str)
def test_decode_equals_the_oracle(spec: Spec) -> None:
    for kinds, weight, numel in zip(
        SUMS, (1.0, 0.25, float(np.float32(1 / 3)), -1.0), (TILE, 77, 1, 5000), strict=True
    ):
        payloads = payloads_of(spec, kinds, numel)
        want = cases.values("normal", numel, 99)[0]
        want[::3] = -0.0
        got = torch.from_numpy(want.copy())
        reference.decode_add(spec, list(payloads), want, weight, DIGEST)
        jit_codec(spec).decode_add(torch.from_numpy(payloads), got, weight, DIGEST)
        assert got.numpy().tobytes() == want.tobytes(), (kinds, weight)


@pytest.mark.parametrize("spec", [*FEW, parse("sign1")], ids=str)
def test_sum_and_reencode_equals_decoding_and_encoding(spec: Spec) -> None:
    for kinds, numel, decay in zip(SUMS, (TILE + 3, 77, 1, 300), (1.0, 0.5, 1.0, 1.0), strict=True):
        payloads, weight = payloads_of(spec, kinds, numel), float(np.float32(1 / len(kinds)))
        e_in = cases.values("normal", numel, 98)[1]
        e_in[::2] = -0.0  # with payloads of as much: their sum begins at a positive zero, and stays one
        total, rest = np.zeros(numel, np.float32), np.zeros(numel, np.float32)
        want = np.zeros(spec.nbytes(numel), np.uint8)
        reference.decode_add(spec, list(payloads), total, weight, DIGEST)
        reference.encode(spec, total, e_in, rest, want, DIGEST, decay=decay)
        got, e_out = torch.full((want.size,), 0xA5, dtype=torch.uint8), torch.from_numpy(e_in.copy())
        again = jit_codec(spec).reencode
        assert again is not None
        again(torch.from_numpy(payloads), numel, e_out, e_out, got, DIGEST, weight=weight, decay=decay)
        assert got.numpy().tobytes() == want.tobytes(), kinds
        assert e_out.numpy().tobytes() == rest.tobytes(), kinds


def test_a_damaged_payload_is_refused() -> None:
    spec = parse("int8/g16")
    payloads = torch.from_numpy(payloads_of(spec, ("normal", "normal"), 40))
    payloads[1, 64] += 1
    out, new, rest = torch.ones(40), torch.ones(spec.nbytes(40), dtype=torch.uint8), torch.ones(40)
    codec = jit_codec(spec)
    assert codec.reencode is not None
    for call in (
        partial(codec.decode_add, payloads, out, 1.0, DIGEST),
        partial(codec.reencode, payloads, 40, None, rest, new, DIGEST),
    ):
        with pytest.raises(PayloadFormatError) as refusal:
            call()
        assert (refusal.value.status, refusal.value.index) == (Status.BAD_CHECKSUM, 1)
    assert bool((out == 1).all() and (new == 1).all() and (rest == 1).all())


def test_wrong_tensors_are_refused() -> None:
    spec, grad = parse("int8/g16"), torch.zeros(48)
    payload = torch.zeros(spec.nbytes(48), dtype=torch.uint8)
    codec = jit_codec(spec)
    with pytest.raises(ValueError, match="float32"):
        codec.encode(grad.double(), None, None, payload)
    with pytest.raises(ValueError, match="e_out: float32 or bfloat16"):
        codec.encode(grad, None, grad.half(), payload)
    with pytest.raises(ValueError, match="one type"):
        codec.encode(grad, grad, grad.bfloat16(), payload)
    with pytest.raises(ValueError, match="nbytes"):
        codec.encode(grad, None, None, payload[:-16])
    with pytest.raises(ValueError, match="as many"):
        codec.encode(grad, grad[16:], None, payload)
    with pytest.raises(ValueError, match="alignment"):
        codec.encode(grad, None, None, torch.zeros(payload.numel() + 1, dtype=torch.uint8)[1:])
    with pytest.raises(ValueError, match="alignment"):
        codec.encode(torch.zeros(49)[1:], None, None, payload)
    with pytest.raises(NotImplementedError, match="powersgd"):
        jit_codec(parse("powersgd"))


def test_a_header_made_before_is_the_same() -> None:
    spec, grad = parse("int8"), torch.from_numpy(cases.values("normal", 300, 1)[0])
    header = make_header(spec, 300, DIGEST, grad.device)
    made = [torch.full((spec.nbytes(300),), 7, dtype=torch.uint8) for _ in range(2)]
    jit_codec(spec).encode(grad, None, None, made[0], DIGEST)
    jit_codec(spec).encode(grad, None, None, made[1], header=header)
    assert bool((made[0] == made[1]).all())


# The host wrapper takes the header from the oracle, so a wrong header would be wrong on both sides.
@pytest.mark.parametrize("mutant", sorted(set(quant_cases.MUTANTS) - {"numel off by one"}))
def test_a_planted_bug_is_caught(mutant: str) -> None:
    """The first case that tells the mutant from the oracle tells it from the kernel: numpy looks, for it is fast."""
    right = cases.truth(*FEW)
    with quant_cases.planted(mutant):
        assert cases.differs(cases.told_apart(right), encode)
