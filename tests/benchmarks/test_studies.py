"""The statistics of the quality study, its resuming, and what it reads of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.runs import TrainingRun
from benchmarks.studies import parallel_quality, quality
from benchmarks.studies.statistics import PairedDifference, t_quantile
from tests.train.builders import random_dataset
from train.config import TrainConfig

_FINAL = {
    "ndcg": 0.06,
    "hr": 0.1,
    "popularity_ndcg": 0.01,
    "wire_nbytes_per_step": 1000,
    "exposed_share": 0.25,
    "step_seconds": 0.2,
}


def _write(run_dir: Path, *, finished: bool = True, **changes: object) -> None:
    run_dir.mkdir(parents=True)
    events = [
        {"event": "step", "step": n + 1, "step_seconds": seconds}
        for n, seconds in enumerate([9.0] + [0.2] * 9)
    ]
    if finished:
        events.append({"event": "final", **_FINAL, **changes})  # type: ignore[dict-item]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),  # from printed tables
    [(0.975, 1, 12.7062), (0.975, 7, 2.36462), (0.975, 30, 2.04227), (0.95, 2, 2.91999), (0.5, 4, 0.0)],
)
def test_t_quantiles_are_those_of_the_tables(probability: float, freedom: int, value: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(value, abs=5e-5)


def test_paired_difference_by_hand() -> None:
    paired = PairedDifference.of([1.0, 2.0, 3.0], [1.1, 2.2, 3.3])
    half = 4.30265 * 0.1 / 3**0.5
    assert paired.mean == pytest.approx(0.2)
    assert (paired.low, paired.high) == (
        pytest.approx(0.2 - half, abs=1e-6),
        pytest.approx(0.2 + half, abs=1e-6),
    )
    assert paired.relative_low == pytest.approx((0.2 - half) / 2, abs=1e-6)
    with pytest.raises(ValueError, match="two at least"):
        PairedDifference.of([1.0], [1.0])


def test_a_run_is_read_only_when_it_has_finished(tmp_path: Path) -> None:
    assert TrainingRun.read(tmp_path / "none") is None
    _write(tmp_path / "cut", finished=False)
    assert TrainingRun.read(tmp_path / "cut") is None
    _write(tmp_path / "torn")
    torn = tmp_path / "torn" / "metrics.jsonl"
    torn.write_text(torn.read_text()[:-20])
    assert TrainingRun.read(tmp_path / "torn") is None
    _write(tmp_path / "whole")
    run = TrainingRun.read(tmp_path / "whole")
    assert run is not None
    assert run.step_ms == pytest.approx(200)  # the slow first step is warm-up
    assert run.exposed_ms == pytest.approx(50)


def _study(tmp_path: Path, **changes: object) -> quality.Study:
    settings = {"data": Path("d"), "out": tmp_path, "preset": "demo", "nproc": 4, "nodes": 2, "epochs": None}
    return quality.Study(**{**settings, **changes})  # type: ignore[arg-type]


def test_a_finished_run_is_not_repeated_and_an_unfinished_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = _study(tmp_path)
    _write(tmp_path / "dense-seed0")
    _write(tmp_path / "dense-seed1", finished=False)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert study.run("dense", 0).final["ndcg"] == 0.06
    with pytest.raises(quality.StudyError, match=r"dense, seed 1: train\.run ended with 1"):
        study.run("dense", 1)


def test_runs_with_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    _study(tmp_path).claim()
    _study(tmp_path).claim()
    with pytest.raises(quality.StudyError, match="another --out"):
        _study(tmp_path, epochs=3).claim()


@pytest.mark.parametrize(("loss", "code"), [(0.0, 0), (0.01, 1)])
def test_the_study_passes_or_fails_on_the_lower_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: float, code: int
) -> None:
    for seed, noise in enumerate([0.0, 1e-4, -1e-4]):
        _write(tmp_path / f"dense-seed{seed}", wire_nbytes_per_step=150_000)
        _write(tmp_path / f"topk-seed{seed}", ndcg=0.06 - loss + noise)
    monkeypatch.setattr(sys, "argv", ["quality", "--data", "d", "--seeds", "3", "--out", str(tmp_path)])
    assert quality.main() == code
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["wire_ratio"] == 150
    assert summary["ndcg"]["paired"]["mean"] == pytest.approx(-loss, abs=1e-12)


@pytest.mark.parametrize(
    ("first", "shift", "code"),
    [(8.0001, 1e-4, 0), (8.0, 1e-3, 1), (8.01, 1e-4, 1)],
    ids=["fine", "ndcg", "loss"],
)
def test_the_cut_model_passes_or_fails_on_both_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: float, shift: float, code: int
) -> None:
    """Seeds differ by 5e-4 here (a standard deviation)."""
    monkeypatch.setattr(parallel_quality, "load_directory", lambda _: random_dataset(9, 4000))
    for seed, ndcg in enumerate([0.06, 0.0605, 0.061]):
        _write(tmp_path / f"alone-seed{seed}", ndcg=ndcg)
        _write(tmp_path / f"hybrid-seed{seed}", ndcg=ndcg - shift)
    one = tmp_path / "first-step"
    _write(one / "alone-seed0", loss=8.0)
    _write(one / "hybrid-seed0", loss=first)
    (one / "alone-seed0" / "config.json").write_text(TrainConfig().model_dump_json())
    assert parallel_quality.main(["--data", "d", "--seeds", "3", "--out", str(tmp_path)]) == code
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["spread"] == pytest.approx(5e-4)
    assert summary["paired"]["mean"] == pytest.approx(-shift)


def test_arms_of_the_parallel_study_differ_in_the_mesh_alone() -> None:
    study = parallel_quality.ParallelStudy(
        data=Path("d"), out=Path("o"), preset="scientific", nproc=8, nodes=2, epochs=None, steps=3
    )
    alone, hybrid = (" ".join(study.options(arm)) for arm in ("alone", "hybrid"))
    mesh = "--nproc 8 --nodes 2 --tp 2 --pp 2"
    assert alone.replace("--nproc 1 --nodes 1", mesh) == hybrid
    assert "--model.dropout 0 --max-steps 1" in " ".join(study.first_step().options("alone"))
