"""powersgd's kernels in CUDA C++, executed from their shipped PTX for each architecture, against the oracle, byte for
byte."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from hybridcomm.kernels import PayloadFormatError, parse, reference
from hybridcomm.kernels.cubins import find_ptx, streams
from hybridcomm.kernels.cuda import launch_powersgd, powersgd
from hybridcomm.kernels.device_codec import device_codec, jit_codec
from hybridcomm.kernels.device_tensors import make_header
from hybridcomm.kernels.specs.powersgd import PowerSGDSpec
from tests.kernels import cases
from tests.kernels.cases import DIGEST, Floats
from tests.kernels.executed import TYPES, complaints, of_powersgd
from tests.kernels.ptx_powersgd import (
    added,
    columns_right,
    dependent,
    encoded,
    huge,
    payload_of,
    reencoded,
    wanted,
)
from tests.kernels.ptx_run import PtxRun
from tests.kernels.sparse_cases import SEED
from tests.kernels.test_sparse_mutants import MUTANTS
from tests.ptx.conformance import executable

ARCHS = (80, 100)
"""Of sm_90 most PTX is that of sm_80, see `test_one_text_serves_two_architectures`; all of it encodes, decodes and
reencodes every kind of values in `test_selftest_kernels`."""
SIZES = (9 * 512, 3 * 512 + 48, 16, 12 * 512 + 144)
"""Elements: a tile of rows and one, and regions that end inside a row."""
MANY = 140 * 512 + 16
"""More rows than `right` takes at a time."""

over_specs = pytest.mark.parametrize("spec", powersgd.SPECS, ids=lambda spec: f"rank {spec.rank}")


@pytest.fixture(params=ARCHS, ids=lambda arch: f"sm_{arch}")
def run(request: pytest.FixtureRequest) -> PtxRun:
    return PtxRun(arch=request.param)


@over_specs
def test_encoding_equals_the_oracle(spec: PowerSGDSpec) -> None:
    """A third of the kinds for each rank."""
    run, turn = PtxRun(arch=100), spec.rank.bit_length()
    for i, kind in enumerate(cases.KINDS):
        if (i + turn) % 3 == 0:
            grad, e_in = cases.values(kind, SIZES[i % 4], 7)
            given = (grad, None if i % 4 == 3 else e_in, TYPES[i // 3 % 6], (1.0, 0.9)[i % 2])
            assert encoded(run, spec, *given) == wanted(spec, *given), (kind, grad.size, given[2:])


@over_specs
def test_what_sm_80_has_for_itself_equals_the_oracle(spec: PowerSGDSpec) -> None:
    run, (grad, e_in) = PtxRun(arch=80), cases.values("heavy", 9 * 512, 8)
    types = (("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"))[spec.rank // 2]
    assert encoded(run, spec, grad, e_in, types) == wanted(spec, grad, e_in, types)
    total, payload = np.zeros(grad.size, np.float32), payload_of(spec, grad)
    reference.decode_add(spec, [payload], total, 0.25, DIGEST)
    for rest in ("bf16", "fp32")[: 1 + (spec.rank == 4)]:
        want = wanted(spec, total, e_in, ("fp32", rest), 0.9)
        assert reencoded(run, spec, [payload], e_in, grad.size, rest, 0.9) == want, rest


def test_one_text_serves_two_architectures() -> None:
    """But where bf16 is converted, and these kernels are run on all."""
    for kernel in powersgd.KERNELS:
        texts = [find_ptx(kernel.name, arch).data.decode().splitlines() for arch in (80, 90)]
        plain = {
            tuple(line for line in text if not line.startswith((".target", ".version"))) for text in texts
        }
        assert len(plain) == 1 or "bf16" in kernel.name, kernel.name


@over_specs
def test_many_rows_are_added_in_order(spec: PowerSGDSpec) -> None:
    run, (grad, e_in) = PtxRun(arch=(80, 100)[spec.rank == 2]), cases.values("drifting scale", MANY, 3)
    assert encoded(run, spec, grad, e_in) == wanted(spec, grad, e_in)


@over_specs
def test_columns_of_any_length_become_orthonormal(spec: PowerSGDSpec, run: PtxRun) -> None:
    """Of more rows than are multiplied at a time, which a whole region would take long to bring."""
    assert columns_right(spec, executable, run.arch)


@over_specs
@pytest.mark.parametrize("values", [huge, dependent])
def test_what_is_not_sent_stays(spec: PowerSGDSpec, values: Callable[[int], Floats]) -> None:
    run, grad = PtxRun(arch=100), values(9 * 512)
    types = ("fp32", "fp32" if (values is huge) == (spec.rank == 2) else "bf16")
    assert encoded(run, spec, grad, None, types) == wanted(spec, grad, None, types)


def before(numel: int) -> Floats:
    values = cases.values("normal", numel, 99)[0]
    values[::3] = -0.0
    return values


SUMS = (("normal", "heavy", "zero"), ("negative zero", "spike"), ("normal", "nan"), ("denormal", "huge"))


@over_specs
def test_decoding_equals_the_oracle(spec: PowerSGDSpec, run: PtxRun) -> None:
    for kinds, weight, numel in zip(SUMS, (1.0, 0.25, 0.5, -1.0), SIZES, strict=True):
        payloads = [payload_of(spec, cases.values(kind, numel, i)[0], i) for i, kind in enumerate(kinds)]
        for clear in (False, True):
            want = np.zeros(numel, np.float32) if clear else before(numel)
            reference.decode_add(spec, payloads, want, weight, DIGEST)
            assert added(run, spec, payloads, before(numel), weight, clear=clear) == want.tobytes(), kinds


@over_specs
def test_reencoding_is_decoding_and_encoding(spec: PowerSGDSpec) -> None:
    run = PtxRun(arch=100)
    for i, (kinds, numel) in enumerate(zip(SUMS, SIZES, strict=True)):
        payloads = [payload_of(spec, cases.values(kind, numel, j)[0], j) for j, kind in enumerate(kinds)]
        total, e_in = np.zeros(numel, np.float32), None if i == 3 else before(numel)
        reference.decode_add(spec, payloads, total, 0.25, DIGEST)
        rest = ("fp32", "bf16")[(i + spec.rank // 2) % 2]
        want = wanted(spec, total, e_in, ("fp32", rest), 0.9)
        assert reencoded(run, spec, payloads, e_in, numel, rest, 0.9) == want, (kinds, rest)


def test_a_header_made_before_has_the_seed() -> None:
    run, spec, grad = PtxRun(arch=90), powersgd.SPECS[1], cases.values("normal", 1024, 1)[0]
    payload, e_out = torch.zeros(spec.nbytes(1024), dtype=torch.uint8), torch.zeros(1024)
    header = make_header(spec, 1024, DIGEST, torch.device("cpu"), seed=SEED)
    launch_powersgd.encode(run, spec, torch.from_numpy(grad), None, e_out, payload, header=header)
    assert payload.numpy().tobytes() == wanted(spec, grad, None)[0]


@over_specs
def test_nothing_is_launched_for_an_empty_region(spec: PowerSGDSpec) -> None:
    run, nothing = PtxRun(arch=90), np.zeros(0, np.float32)
    assert encoded(run, spec, nothing, None) == wanted(spec, nothing, None)
    assert added(run, spec, [payload_of(spec, nothing)], nothing, 1.0) == b""
    assert not run.launches


def test_what_does_not_fit_is_refused() -> None:
    run, spec = PtxRun(arch=90), powersgd.SPECS[0]
    grad, rest = torch.zeros(48), torch.zeros(48)
    payload = torch.zeros(spec.nbytes(48), dtype=torch.uint8)
    with pytest.raises(ValueError, match="multiple of 16"):
        launch_powersgd.encode(run, spec, grad[:40], None, rest[:40], payload)
    with pytest.raises(ValueError, match="another buffer"):
        launch_powersgd.encode(run, spec, grad, rest, rest, payload)
    with pytest.raises(ValueError, match="one type"):
        launch_powersgd.encode(run, spec, grad, rest.bfloat16(), rest, payload)
    with pytest.raises(ValueError, match="nbytes"):
        launch_powersgd.encode(run, spec, grad, None, rest, payload[:-16])
    with pytest.raises(ValueError, match="CUDA kernels are there for"):
        launch_powersgd.encode(run, parse("powersgd:3"), grad, None, rest, payload)
    with pytest.raises(PayloadFormatError):
        launch_powersgd.decode_add(run, spec, payload[None], rest)
    with pytest.raises(PayloadFormatError):
        launch_powersgd.reencode(run, spec, payload[None], 48, None, rest, payload)
    assert not run.launches


def test_no_payload_changes_nothing_or_clears() -> None:
    run, spec = PtxRun(arch=90), powersgd.SPECS[0]
    none, out = torch.zeros((0, spec.nbytes(48)), dtype=torch.uint8), torch.ones(48)
    launch_powersgd.decode_add(run, spec, none, out)
    assert bool((out == 1).all())
    launch_powersgd.decode_add(run, spec, none, out, clear=True)
    assert not out.any()


@pytest.mark.parametrize("text", ["powersgd:3", "powersgd:2/b256"])
def test_other_settings_have_no_device_kernels(text: str) -> None:
    for make in (lambda spec: device_codec(spec, PtxRun(arch=90)), jit_codec):
        with pytest.raises(NotImplementedError, match="powersgd"):
            make(parse(text))


@over_specs
def test_budgets_hold(spec: PowerSGDSpec, run: PtxRun) -> None:
    launches = list(of_powersgd(spec, run.arch))
    mine = {kernel.name for kernel in powersgd.KERNELS if kernel.codec in ("", str(spec))}
    assert {each.kernel.name for each in launches} == mine
    assert not complaints(launches)


def test_right_reads_in_wide_accesses() -> None:
    """The gate does not ask it of a kernel whose number of programs is fixed."""
    for spec in powersgd.SPECS:
        for arch in (80, 90, 100):
            text = find_ptx(f"powersgd{spec.rank}_right", arch).data[:-1].decode()
            of_acc = [access for access in streams.accesses(text) if access.parameters == {0}]
            assert of_acc
            assert all(access.nbytes == 16 for access in of_acc)


def test_shared_memory_is_aligned_as_it_is_read() -> None:
    """The executor, which lays arrays out from an aligned start, would not notice."""
    wide = set()
    for kernel, arch in product(powersgd.KERNELS, (80, 90, 100)):
        text = find_ptx(kernel.name, arch).data[:-1].decode()
        if re.search(r"\b(?:ld|st)\.shared\.v4\.[bfu]32\b", text):
            wide.add(kernel.name)
            assert set(re.findall(r"\.shared \.align (\d+)", text)) == {"16"}, kernel.name
    assert wide == {f"powersgd{spec.rank}_{name}" for spec in powersgd.SPECS for name in ("left", "right")}


@pytest.mark.parametrize("mutant", sorted(name for name in MUTANTS if name.startswith("powersgd")))
def test_a_planted_bug_is_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, module, attribute, wrong = MUTANTS[mutant]
    run, spec = PtxRun(arch=90), powersgd.SPECS[-1]
    grad, e_in = cases.values("normal", 20 * 512, 7)
    monkeypatch.setattr(module, attribute, wrong)
    assert encoded(run, spec, grad, e_in) != wanted(spec, grad, e_in)
