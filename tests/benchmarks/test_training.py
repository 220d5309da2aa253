"""The training comparison: bytes per step from two runs, and a verdict when counters and engine disagree."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import pytest

from benchmarks import bench_training
from benchmarks.runs import TrainingRun

_START, _PER_STEP = 50_000_000, 260_000  # weights and evaluation once, gradients every step


class _FakeCluster(contextlib.nullcontext[None]):
    shape = "unshaped"

    def __init__(self, *_: object) -> None:
        super().__init__(self)  # type: ignore[arg-type]


def _fake_run(engine: int | None) -> object:
    def run(_: object, options: list[str], steps: int) -> tuple[TrainingRun, int, int]:
        final = {"wire_nbytes_per_step": engine if "ddp" not in options else None, "loss": 8.0, "ndcg": 0.1}
        final |= {"hr": 0.2, "samples_per_second": 100.0, "exposed_share": 0.1, "step_seconds": 0.5}
        return TrainingRun(final=final, step_seconds=[0.5] * steps), _START + _PER_STEP * steps, 10 * steps

    return run


@pytest.mark.parametrize(("engine", "code"), [(250_000, 0), (240_000, 1), (290_000, 1)])
def test_counters_must_agree_with_the_engine_within_7_percent(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: int,
    code: int,
) -> None:
    out = tmp_path / "figures.json"
    monkeypatch.setattr(bench_training, "Cluster", _FakeCluster)
    monkeypatch.setattr(bench_training, "_run", _fake_run(engine))
    monkeypatch.setattr(sys, "argv", ["bench_training", "--steps", "12", "--json", str(out)])
    assert bench_training.main() == code
    lines = {line["key"]: line for line in json.loads(out.read_text())["lines"]}
    assert lines["topk"]["counted_bytes"] == _PER_STEP  # what was sent once is not in it
    assert lines["ddp"]["agreement"] is None
    said = capsys.readouterr()
    assert "| torch DDP, gloo" in said.out
    assert ("disagree" in said.err) == bool(code)


@pytest.mark.parametrize("argv", [["--variants", "ddp,horovod"], ["--steps", "2"]])
def test_options_that_cannot_act_are_refused(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_training", *argv])
    with pytest.raises(SystemExit, match="2"):
        bench_training.main()
