"""The roofline page: what the generator prints, from arithmetic that can be done by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import roofline
from hybridcomm.kernels.cubins import KernelError, executed, roof
from hybridcomm.kernels.cubins.gpu import GPUS
from hybridcomm.kernels.cubins.manifest import Build, Manifest, Stream
from tests.kernels.cubins.fakes import FIGURES, KERNEL, make_artefacts, make_sources

ROUNDINGS = 8 * sys.float_info.epsilon  # no more than eight operations on each side

_STREAM = Stream(name="grad", store=False, itemsize=4, wide=4.0, narrow=0.0, guarded=0.0)


@pytest.fixture
def built(tmp_path: Path) -> Build:
    manifest = make_artefacts(tmp_path / "artefacts", make_sources(tmp_path / "kernels"))
    return replace(manifest.entries[0].builds[1], figures=replace(FIGURES, streams=(_STREAM,)))


def test_the_page_in_the_repository_is_the_generators() -> None:
    assert roofline.PAGE.read_text(encoding="utf-8") == roofline.page(Manifest.read()), "run `make cubins`"


def test_memory_sets_the_rate_of_a_light_kernel(built: Build) -> None:
    kernel = replace(KERNEL, elements=4096, budget=replace(KERNEL.budget, nbytes=8 * roof.OVERHEAD))
    predicted = roof.predict(kernel, built)
    assert predicted.limit == "memory"
    assert predicted.rate == pytest.approx(
        rel=ROUNDINGS, expected=GPUS[90].bandwidth * roof.DRAM / (8 * roof.OVERHEAD)
    )
    assert predicted.share == pytest.approx(rel=ROUNDINGS, expected=roof.DRAM / roof.OVERHEAD)


def test_a_pipe_or_the_issue_slots_set_the_rate_of_a_heavy_one(built: Build) -> None:
    kernel, gpu = replace(KERNEL, elements=4096), GPUS[90]
    heavy = replace(
        built, figures=replace(built.figures, instructions=400.0, pipes={"alu": 300.0, "lsu": 100.0})
    )
    predicted = roof.predict(kernel, heavy)
    assert predicted.limit == "alu"
    assert predicted.rate == pytest.approx(
        rel=ROUNDINGS, expected=64 * gpu.sms * gpu.clock * roof.ISSUE / 300
    )
    mixed = replace(heavy.figures, pipes={"alu": 150.0, "imad": 100.0, "fp32": 150.0})
    assert roof.predict(kernel, replace(heavy, figures=mixed)).limit == "issue"


def test_loops_count_as_executed(built: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a program runs one case of several."""
    monkeypatch.setattr(executed, "read", lambda: {KERNEL.name: {90: 4000.0}})
    kernel, gpu = replace(KERNEL, elements=4096), GPUS[90]
    cases = replace(kernel, budget=replace(kernel.budget, cold=5000))
    looping = replace(built, figures=replace(built.figures, loops=1))
    alu = 4000 * built.figures.pipes["alu"] / built.figures.instructions
    for found in (roof.predict(kernel, looping), roof.predict(cases, built)):
        assert found.limit == "alu"
        assert found.rate == pytest.approx(
            rel=ROUNDINGS, expected=64 * gpu.sms * gpu.clock * roof.ISSUE / alu
        )
    assert roof.predict(kernel, built).limit == "memory"
    with pytest.raises(KernelError, match=r"another, sm_90: not in executed\.json"):
        roof.work(replace(kernel, name="another"), looping)


def test_loops_over_payloads_count_as_often_as_they_run(built: Build) -> None:
    kernel, figures = replace(KERNEL, elements=4096, trips=3), built.figures
    looping = replace(built, figures=replace(figures, loops=1, looped={"alu": 1.0}))
    assert roof.work(kernel, looping) == {"alu": 5.0, "lsu": 1.0, "issue": 6.0}
    assert roof.work(kernel, looping, 6.0) == {"alu": 10.0, "lsu": 2.0, "issue": 12.0}
    assert roof.work(replace(kernel, trips=1), looping) == {**figures.pipes, "issue": 4.0}


def _row(text: str, name: str) -> list[str]:
    return [
        cell.strip()
        for line in text.splitlines()
        if line.startswith(f"| {name} ")
        for cell in line.split("|")
    ]


def test_goals_are_those_of_default_settings_and_tails_have_no_row() -> None:
    text = roofline.page(Manifest.read())
    assert "85%: met" in _row(text, "int8_encode_fp32_fp32")
    assert "75%: met" in _row(text, "topk_encode_fp32_fp32")
    for without in ("topk_int8_encode_fp32_fp32", "int4_encode_fp32_fp32"):
        row = _row(text, without)
        assert row
        assert not any("met" in cell or "missed" in cell for cell in row)
    assert not _row(text, "int8_encode_fp32_fp32_tail")


def test_what_is_affordable_leaves_the_share(built: Build) -> None:
    gpu = GPUS[90]
    most = roof.affordable(gpu, 8, "issue", 0.5)
    kernel = replace(KERNEL, elements=4096, budget=replace(KERNEL.budget, nbytes=8 * roof.OVERHEAD))
    busy = replace(built, figures=replace(built.figures, instructions=most, pipes={"fp32": most / 2}))
    predicted = roof.predict(kernel, busy)
    assert predicted.limit == "issue"
    assert predicted.share == pytest.approx(rel=ROUNDINGS, expected=0.5)


def test_more_payloads_take_more(built: Build) -> None:
    kernel = replace(KERNEL, elements=4096, budget=replace(KERNEL.budget, nbytes=8.0))
    one = roof.predict(kernel, built)
    assert roof.predict(kernel, built, nbytes=8.0).rate == pytest.approx(rel=ROUNDINGS, expected=one.rate / 2)
    assert roof.work(kernel, built, 6.0)["alu"] == pytest.approx(rel=ROUNDINGS, expected=7.5)


def test_few_loads_under_way_leave_the_memory_idle(built: Build) -> None:
    kernel = replace(KERNEL, elements=128)
    predicted = roof.predict(kernel, built)
    assert predicted.limit == "latency"
    resident = 16 * 128 * 4  # blocks of 4 warps, 4 bytes per element each
    assert predicted.rate == pytest.approx(
        rel=ROUNDINGS, expected=resident / 800e-9 * GPUS[90].sms * roof.DRAM / 8
    )


def test_as_many_programs_for_any_region_stream_nothing(built: Build) -> None:
    kernel = replace(KERNEL, elements=4096)
    assert roof.streamed(kernel, built) == 4
    assert roof.streamed(replace(kernel, elements=1 << 62), built) == 0


def test_additions_in_a_row_are_those_of_the_passes() -> None:
    """Counted by hand: 32 and four halvings for P, one, five or nineteen dot products, all rows for Q."""
    assert roof.in_order(1, 512) == 36 + 36 + 512
    assert roof.in_order(2, 512) == 36 + 5 * 36 + 512
    assert roof.in_order(4, 8 * 16 + 1) == 36 + 19 * (9 + 4) + 129
    least = roof.in_order(1, 512) * roof.ADD / GPUS[90].clock
    row = next(
        line for line in roofline.page(Manifest.read()).splitlines() if line.startswith("| powersgd:1 ")
    )
    assert "| 584 " in " ".join(row.split())
    assert f"{1e6 * least:.1f} ({512 * 512 / least / 1e9:.0f})" in row


def test_every_assumption_is_printed() -> None:
    text = roofline.page(Manifest.read())
    for gpu in GPUS.values():
        for figure in (f"{gpu.bandwidth / 1e9:,.0f}", str(gpu.sms), f"{gpu.clock / 1e9:g}", gpu.name):
            assert figure in text
    for share in (roof.DRAM, roof.ISSUE):
        assert f"{share:.0%}" in text
    assert "*prediction*" in text
