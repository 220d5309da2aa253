"""What the quantising codecs promise, checked on the C++ kernels by docs/payload.md, the oracle left out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm.kernels import Codec, Spec, SpecError, host, parse
from hybridcomm.kernels.vectors import NONFINITE
from tests.kernels import cases, quant_cases
from tests.kernels.cases import DIGEST, Case, Floats
from tests.kernels.quant_cases import FEW

FINITE = tuple(kind for kind in cases.KINDS if kind not in NONFINITE)
GROUPED = tuple(spec for spec in quant_cases.SPECS if spec.codec not in (Codec.FP16, Codec.BF16))


def compress(spec: Spec, grad: Floats, e_in: Floats | None = None) -> tuple[Floats, Floats, Floats]:
    """Compensated gradient, new residual and decoded values."""
    payload, e_out = np.zeros(spec.nbytes(grad.size), np.uint8), np.zeros_like(grad)
    assert host.encode(spec, grad, e_in, e_out, payload, DIGEST) == 0
    decoded = np.zeros_like(grad)
    host.decode_add(spec, [payload], decoded, 1.0, DIGEST)
    return (grad if e_in is None else grad + e_in), e_out, decoded


def groups(values: Floats, group: int) -> np.ndarray:
    """(groups, group) fp64, the last one padded with zeros."""
    padded = np.zeros(-(-values.size // group) * group)
    padded[: values.size] = values
    return padded.reshape(-1, group)


@settings(deadline=None, max_examples=150)
@given(case=cases.cases(kinds=FINITE, of=quant_cases.specs()))
def test_nothing_is_lost_but_where_it_is_said(case: Case) -> None:
    """Exact, but for sign1, which rounds the difference once, and for what fp16 cannot hold by far."""
    acc, e_out, decoded = compress(case.spec, *case.inputs())
    exact = np.full(acc.size, case.spec.codec is not Codec.SIGN1)
    if case.spec.codec is Codec.FP16:
        exact = np.abs(acc) < 2.0**29
    whole = (decoded.astype(np.float64) + e_out == acc) | ~exact
    assert whole.all()
    assert (e_out == acc - decoded).all()


@settings(deadline=None, max_examples=150)
@given(case=cases.cases(kinds=FINITE, of=quant_cases.specs()))
def test_the_error_is_within_half_a_step(case: Case) -> None:
    acc, _, decoded = compress(case.spec, *case.inputs())
    spec, exact = case.spec, acc.astype(np.float64)
    if spec.codec is Codec.SIGN1 or not acc.size:
        return
    size, error = np.abs(exact), np.abs(exact - decoded)
    largest = np.abs(groups(acc, spec.block)).max(axis=1)
    floor = np.exp2(
        np.floor(np.log2(np.maximum(largest, 2.0**-126)))
    )  # power of two at the largest, or the floor
    scale = np.repeat(floor, spec.block)[: acc.size]
    if spec.codec in (Codec.INT8, Codec.INT4):
        top = spec.value_bits - 2
        step = np.maximum(scale * 2.0**-top, 2.0**-126)
        clamped = size > (2.0 ** (top + 1) - 1) * step
        assert (error <= np.where(clamped, 1.0, 0.5) * step).all()
    else:
        forms = {Codec.FP16: (10, 2.0**-14), Codec.BF16: (7, 2.0**-126), Codec.FP8: (3 - spec.params[2], 0.0)}
        digits, smallest = forms[spec.codec]
        if spec.codec is Codec.FP8:
            top, emin = ((7, -6), (14, -14))[spec.params[2]]
            smallest = np.maximum(scale * 2.0**-top, 2.0**-126) * 2.0**emin
        half = np.maximum(np.exp2(np.floor(np.log2(np.maximum(size, 2.0**-149)))), smallest) * 2.0 ** -(
            digits + 1
        )
        largest_code = 65504.0 if spec.codec is Codec.FP16 else np.inf
        above = size > largest_code
        # Where the largest code of a group is all there is, up to a whole step is lost.
        edge = size >= (2.0 - 2.0**-digits) * scale if spec.codec is not Codec.FP16 else above
        assert (error <= np.where(edge, 2.0, 1.0) * half)[~above].all()
        assert (np.abs(decoded)[above] == np.float32(largest_code)).all()
    assert (error <= size).all(), "never farther than sending nothing"


@settings(deadline=None, max_examples=150)
@given(case=cases.cases(kinds=FINITE, of=st.sampled_from(GROUPED)))
def test_every_group_contracts(case: Case) -> None:
    acc, _, decoded = compress(case.spec, *case.inputs())
    spec, error = case.spec, acc.astype(np.float64) - decoded
    before, after = (groups(values, spec.block) for values in (acc, error))
    proven = np.abs(before).max(axis=1) >= 2.0 ** (-105 if spec.codec is Codec.SIGN1 else 14 - 126)
    before, after = (before[proven] ** 2).sum(axis=1), (after[proven] ** 2).sum(axis=1)
    assert spec.contraction is not None
    assert (after <= (1 - spec.contraction) * before * (1 + 2.0**-52 * spec.block)).all()


@pytest.mark.parametrize("spec", GROUPED, ids=str)
def test_the_contraction_claims_little_less_than_is_there(spec: Spec) -> None:
    """Two-sided: an input that loses nearly as much as the bound allows."""
    claim = spec.contraction
    assert claim is not None
    worst = np.zeros(spec.block, np.float32)
    if spec.codec is Codec.SIGN1:
        worst[3], worst[0] = 1.0, 0.0
        most = 1.0 / spec.block
    else:
        top = {Codec.INT8: 6, Codec.INT4: 2}.get(spec.codec, 0)
        half = 0.5
        if spec.codec is Codec.FP8:
            top, half = ((7, 2.0**-10), (14, 2.0**-17))[spec.params[2]]
        worst[:] = half * (1 - 2.0**-20)
        worst[spec.block // 2] = 2.0**top
        rest = (spec.block - 1) * half**2
        most = 1.0 - rest / (4.0**top + rest)
    acc, _, decoded = compress(spec, worst)
    error, energy = (acc.astype(np.float64) - decoded) ** 2, acc.astype(np.float64) ** 2
    delivered = 1.0 - error.sum() / energy.sum()
    assert claim <= delivered <= most * (1 + 2.0**-15)
    assert claim >= 0.9 * most


@pytest.mark.parametrize("text", ["bf16"])
def test_a_cast_contracts_by_its_digits(text: str) -> None:
    spec = parse(text)
    grad, _ = cases.values("heavy", 5000, 4)
    acc, _, decoded = compress(spec, grad[np.abs(grad) >= 2.0**-126])
    lost = (acc.astype(np.float64) - decoded) ** 2
    assert spec.contraction is not None
    assert (lost <= (1 - spec.contraction) * acc.astype(np.float64) ** 2).all()
    tie, _, rounded = compress(spec, np.full(16, 1 + 2.0**-8, np.float32))
    assert ((tie - rounded) ** 2 >= 0.98 * (1 - spec.contraction) * tie.astype(np.float64) ** 2).all()
    assert parse("fp16").contraction is None


@settings(deadline=None, max_examples=60)
@given(
    case=cases.cases(kinds=("normal", "tied", "spike", "same magnitude"), of=st.sampled_from(GROUPED[-3:]))
)
def test_sign1_sends_the_mean_magnitude(case: Case) -> None:
    grad, _ = case.inputs()
    _, _, decoded = compress(case.spec, grad)
    for begin in range(0, grad.size, case.spec.block):
        part = slice(begin, begin + case.spec.block)
        mean = np.abs(grad[part].astype(np.float64)).mean()
        sent = np.abs(decoded[part])
        assert (sent == sent[0]).all()
        assert (np.signbit(decoded[part]) == np.signbit(grad[part])).all()
        assert (1 - 2.0**-6) * mean <= sent[0] <= mean or mean < 2.0**-105


@pytest.mark.parametrize("spec", FEW, ids=str)
def test_residuals_deliver_everything_in_the_end(spec: Spec) -> None:
    """What arrives over many steps is the sum of the gradients, up to a residual that does not grow."""
    numel, steps = 500, 40
    grad = np.random.default_rng(8).standard_normal(numel).astype(np.float32)
    e, applied, sizes = np.zeros(numel, np.float32), np.zeros(numel), []
    for _ in range(steps):
        _, e, decoded = compress(spec, grad, e)
        applied += decoded
        sizes.append(float(np.abs(e).sum()))
    assert np.abs(applied + e - grad.astype(np.float64) * steps).max() <= steps * 2.0**-20
    assert max(sizes[steps // 2 :]) <= 2 * max(sizes[: steps // 2])
    assert np.abs(applied).sum() > 0.5 * steps * np.abs(grad).sum()


@settings(deadline=None, max_examples=60)
@given(spec=quant_cases.specs(), numel=st.integers(0, 20_000))
def test_the_size_is_a_function_of_spec_and_numel(spec: Spec, numel: int) -> None:
    _, bits, _, group, _ = spec.params
    scale = {Codec.FP16: 0, Codec.BF16: 0, Codec.SIGN1: 2}.get(spec.codec, 1) * -(-numel // group)
    codes = -(-numel * bits // 8)
    assert spec.nbytes(numel) == 64 + -(-scale // 16) * 16 + -(-codes // 16) * 16
    assert host.nbytes(spec, numel) == spec.nbytes(numel)


@settings(deadline=None)
@given(spec=quant_cases.specs())
def test_the_text_of_a_spec_reads_back(spec: Spec) -> None:
    assert parse(str(spec)) == spec
    assert hash(parse(str(spec))) == hash(spec)


def test_short_texts_take_defaults() -> None:
    texts = {"int8": "int8/g128", "int4": "int4/g32", "sign1": "sign1/g256", "fp16": "fp16", "bf16": "bf16"}
    texts |= {"fp8": "fp8:e4m3/g128", "fp8:e5m2": "fp8:e5m2/g128", "fp8/g64": "fp8:e4m3/g64"}
    assert {text: str(parse(text)) for text in texts} == texts


@pytest.mark.parametrize(
    "text", ["fp16/g16", "bf16:", "fp8:e3m4", "int8:4", "int8/g", "sign1/128", "int4/g32 "]
)
def test_a_malformed_text_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="write "):
        parse(text)


@pytest.mark.parametrize("text", ["int8/g8", "int4/g100", "sign1/g8192", "fp8/g0"])
def test_an_impossible_group_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="power of two from 16 to 4096"):
        parse(text)


@pytest.mark.parametrize("spec", FEW, ids=str)
def test_a_planted_loss_breaks_the_law(spec: Spec) -> None:
    acc, e_out, decoded = compress(spec, cases.values("normal", 640, 1)[0])
    e_out[17] = np.nextafter(e_out[17], np.float32(9))
    assert not (e_out == acc - decoded).all()
    if spec.contraction is not None:
        assert (acc**2).sum() > (1 - spec.contraction) * (acc**2).sum(), "sending nothing breaks the bound"
