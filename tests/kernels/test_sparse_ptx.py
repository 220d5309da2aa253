"""The kernels in CUDA C++, executed from their shipped PTX for each architecture, against the oracle, byte for byte."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from hybridcomm.kernels import PayloadFormatError, SpecError, parse, reference
from hybridcomm.kernels.cuda import gtopk, launch, topk
from tests.kernels import cases, mutants
from tests.kernels.cases import DIGEST, Case, Floats
from tests.kernels.executed import TYPES, complaints, of_sparse
from tests.kernels.ptx_sparse import KERNELS, Device, inputs, narrowed, widened
from tests.ptx.errors import PtxError

ARCHS = (80, 90, 100)
KINDS = (*cases.KINDS, "few lanes", "few lanes tied")
SIZES = (4096 + 16, 1024, 16, 2048 + 512)


@pytest.fixture(params=ARCHS, ids=lambda arch: f"sm_{arch}")
def device(request: pytest.FixtureRequest) -> Device:
    return Device(arch=request.param)


def case_of(kind: str, numel: int, spec: Any = topk.SPEC, *, seed: int = 7, memoryless: bool = False) -> Case:
    return Case(spec=spec, kind=kind, numel=numel, seed=seed, memoryless=memoryless)


def encoded(device: Device, case: Case) -> tuple[int, bytes, bytes]:
    grad, e_in = inputs(case)
    payload, e_out = np.zeros(case.spec.nbytes(case.numel), np.uint8), np.zeros(case.numel, np.float32)
    flags = device.encode(case.spec, grad, None if case.memoryless else e_in, e_out, payload)
    return flags, payload.tobytes(), e_out.tobytes()


def wanted(device: Device, case: Case) -> tuple[int, bytes, bytes]:
    """The oracle on widened inputs; its residual rounded half to even."""
    grad, e_in = inputs(case)
    grad, e_in = (
        widened(narrowed(grad, device.grad), device.grad),
        widened(narrowed(e_in, device.rest), device.rest),
    )
    payload, e_out = np.zeros(case.spec.nbytes(case.numel), np.uint8), np.zeros(case.numel, np.float32)
    given = None if case.memoryless else e_in
    flags = reference.encode(case.spec, grad, given, e_out, payload, DIGEST, decay=device.decay)
    return flags, payload.tobytes(), widened(narrowed(e_out, device.rest), device.rest).tobytes()


def corpus(spec: Any) -> Iterator[Case]:
    for i, kind in enumerate(KINDS):
        yield case_of(kind, SIZES[i % 4], spec, memoryless=i % 4 == 3)
    yield case_of("half steps", 16, spec)  # few elements: what is kept is not all at the end of the scale


@functools.cache
def truth() -> tuple[tuple[Case, tuple[int, bytes, bytes]], ...]:
    """What the oracle makes of the corpus, before anything is planted."""
    return tuple((case, wanted(Device(arch=90), case)) for case in corpus(topk.SPEC))


def test_topk_equals_the_oracle(device: Device) -> None:
    for i, case in enumerate(corpus(topk.SPEC)):
        device.grad, device.rest = TYPES[i % len(TYPES)]
        device.decay = (1.0, 0.9)[i % 2]
        assert encoded(device, case) == wanted(device, case), (case, device)


def test_gtopk_equals_the_oracle(device: Device) -> None:
    for i, case in enumerate(corpus(gtopk.SPEC)):
        device.grad, device.rest = TYPES[i % len(TYPES)]
        device.decay = (1.0, 0.9)[i % 2]
        assert encoded(device, case) == wanted(device, case), (case, device)


@pytest.mark.parametrize("spec", [topk.SPEC, gtopk.SPEC], ids=str)
def test_nothing_is_launched_for_an_empty_region(spec: Any) -> None:
    device = Device(arch=90)
    case = case_of("normal", 0, spec)
    assert encoded(device, case) == wanted(device, case)
    assert not device.launches


@pytest.mark.parametrize("spec", [topk.SPEC, gtopk.SPEC], ids=str)
def test_what_does_not_fit_is_refused(spec: Any) -> None:
    run, device = Device(arch=90).run, torch.device("cpu")
    grad, rest = torch.zeros(48), torch.zeros(48)
    payload = torch.zeros(spec.nbytes(48), dtype=torch.uint8)
    with pytest.raises(ValueError, match="multiple of 16"):
        launch.encode(run, spec, grad[:40], None, rest[:40], payload)
    with pytest.raises(ValueError, match="another buffer"):
        launch.encode(run, spec, grad, rest, rest, payload)
    with pytest.raises(ValueError, match="nbytes"):
        launch.encode(run, spec, grad, None, rest, payload[:-16])
    with pytest.raises(ValueError, match="CUDA kernels are there for"):
        launch.encode(run, parse("int8"), grad, None, rest, payload)
    with pytest.raises(PayloadFormatError):
        launch.decode_add(run, spec, payload[None], rest)
    if spec == gtopk.SPEC:
        short = launch.make_workspace(48, device)[:-16]
        with pytest.raises(ValueError, match="workspace: "):
            launch.encode(run, spec, grad, None, rest, payload, workspace=short)
        with pytest.raises(ValueError, match="alone"):
            launch.reencode(run, spec, payload[None], 48, None, rest, payload)
    assert not run.launches


def payloads_of(spec: Any, numel: int, *kinds: str) -> list[Any]:
    return [cases.encoded(case_of(kind, numel, spec, seed=i))[1] for i, kind in enumerate(kinds)]


def old(numel: int) -> Floats:
    values = cases.values("normal", numel, 99)[0]
    values[::3] = -0.0
    return values


@pytest.mark.parametrize("spec", [topk.SPEC, gtopk.SPEC], ids=str)
def test_decoding_equals_the_oracle(device: Device, spec: Any) -> None:
    for numel, weight, kinds in (
        (2 * 1024, 0.25, ("normal", "heavy", "spike", "negative zero")),
        (1024 + 16, -1.0, ("tied", "denormal")),
        (16, 1.0, ("normal", "nan")),
    ):
        payloads = payloads_of(spec, numel, *kinds)
        for clear in (False, True) if spec == topk.SPEC else (False,):
            got, want = old(numel), np.zeros(numel, np.float32) if clear else old(numel)
            reference.decode_add(spec, payloads, want, weight, DIGEST)
            device.decode_add(spec, payloads, got, weight, clear=clear)
            assert got.tobytes() == want.tobytes(), (numel, weight, clear)


@pytest.mark.parametrize("kinds", [("normal", "heavy", "tied"), ("normal", "inf")], ids=["finite", "flagged"])
def test_reencoding_is_decoding_and_encoding(device: Device, kinds: tuple[str, ...]) -> None:
    numel, device.decay = 1024 + 512, 0.9
    for rest in ("fp32", "bf16"):
        device.rest = rest
        payloads, e_in = payloads_of(topk.SPEC, numel, *kinds), inputs(case_of("normal", numel))[1]
        e_in = widened(narrowed(e_in, rest), rest)
        want, got = (np.zeros(topk.SPEC.nbytes(numel), np.uint8) for _ in range(2))
        want_rest, got_rest, total = (np.zeros(numel, np.float32) for _ in range(3))
        reference.decode_add(topk.SPEC, payloads, total, 0.25, DIGEST)
        reference.encode(topk.SPEC, total, e_in, want_rest, want, DIGEST, decay=0.9)
        device.reencode(payloads, e_in, got_rest, got)
        assert got.tobytes() == want.tobytes(), rest
        assert got_rest.tobytes() == widened(narrowed(want_rest, rest), rest).tobytes(), rest


def test_budgets_hold(device: Device) -> None:
    launches = list(of_sparse(device.arch, KINDS))
    assert {each.kernel.name for each in launches} == set(KERNELS)
    assert not complaints(launches)


@pytest.mark.parametrize(
    "mutant", sorted(set(mutants.MUTANTS) - {"numel off by one", "last element dropped"})
)
def test_a_planted_bug_is_caught(mutant: str) -> None:
    """The host writes the header, so a wrong one would be wrong on both sides. A wrong offset is a wrong access."""
    device, right = Device(arch=90), truth()
    with mutants.planted(mutant), contextlib.suppress(PtxError):
        case = next(
            case for case, want in right if wanted(device, case) != want
        )  # numpy looks, for it is fast
        assert encoded(device, case) != wanted(device, case)


def test_sizes_that_need_padding_are_refused() -> None:
    for numel in (8, 1 << 32):
        with pytest.raises(SpecError, match="pad to a multiple of 16"):
            gtopk.encode_steps(numel, withdrawn=0)
