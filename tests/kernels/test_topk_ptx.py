"""The top-k kernels, compiled for each architecture and executed from their PTX, against the oracle, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest

from hybridcomm.kernels import TopKSpec, reference
from tests.kernels import cases
from tests.kernels.cases import Case
from tests.kernels.ptx_topk import Device
from tests.ptx.compiled import CompilerMissingError
from tests.ptx.conformance import Figures

ARCHS = (80, 90, 100)
SPEC = TopKSpec(block=1024, k=10)


@pytest.fixture(params=ARCHS, ids=lambda arch: f"sm_{arch}")
def device(request: pytest.FixtureRequest) -> Device:
    made = Device(arch=request.param)
    try:
        cases.run(Case(spec=SPEC, kind="zero", numel=1, seed=0), made.encode)
    except CompilerMissingError as missing:
        pytest.skip(str(missing))
    return made


def test_encode_equals_the_oracle(device: Device) -> None:
    sizes = (3 * SPEC.block, SPEC.block + 1, SPEC.block - 1, 9)
    for i, kind in enumerate(cases.KINDS):
        case = Case(spec=SPEC, kind=kind, numel=sizes[i % 4], seed=7)
        assert not cases.differs(case, device.encode), case


def test_decode_equals_the_oracle(device: Device) -> None:
    for numel, weight in ((2 * SPEC.block, 0.25), (SPEC.block + 9, -1.0), (5, 1.0)):
        chosen = ("normal", "heavy", "spike", "negative zero") if numel != 5 else ("normal", "nan")
        payloads = [cases.encoded(Case(spec=SPEC, kind=kind, numel=numel, seed=3))[1] for kind in chosen]
        want = cases.values("normal", numel, 99)[0]
        want[::3] = -0.0
        got = want.copy()
        reference.decode_add(SPEC, payloads, want, weight, cases.DIGEST)
        device.decode_add(SPEC, payloads, got, weight)
        assert got.tobytes() == want.tobytes(), (numel, weight)


def test_every_byte_is_moved_once(device: Device, record_property: pytest.RecordProperty) -> None:
    case = Case(spec=SPEC, kind="normal", numel=64 * SPEC.block, seed=1)
    assert not cases.differs(case, device.encode)
    figures = Figures.of(case.numel, *device.launches)
    record_property("figures", str(figures))
    print(f"encode, sm_{device.arch}: {figures}")
    payload = case.spec.nbytes(case.numel)
    # Gradient and residual are read, the residual written; the kept and their indices once more; one flag and two
    # 8-byte atomics per block besides.
    kept = SPEC.layout[1] * SPEC.nblocks(case.numel)
    more = 12 * kept + (2 * 8 + 4 * 128) * 64
    assert 12 * case.numel + payload // 2 <= figures.nbytes * case.numel <= 12 * case.numel + payload + more
    assert device.launches[0].loaded.widths == {4: 2 * case.numel + kept, 2: kept}
    assert np.isfinite(figures.instructions)
