"""The comparison of compositions on the emulated cluster: what is run, what is read of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest

from benchmarks import bench_hybrid
from benchmarks.bench_hybrid import COMPOSITIONS
from hybridcomm.topology import Topology
from train.mesh import Mesh


class _FakeCluster(contextlib.nullcontext[None]):
    """Runs nothing: leaves figures that depend on the mesh where a run would leave them."""

    shape, world_size = "unshaped", 8
    ran: ClassVar[list[list[str]]] = []
    kind = "emulated"

    def __init__(self, *_: object) -> None:
        super().__init__(self)  # type: ignore[arg-type]

    def run(self, argv: Sequence[str], *, timeout: float) -> None:
        assert timeout > 0
        self.ran.append(list(argv))
        option = {name: value for name, value in pairwise(argv) if name.startswith("--")}
        run_dir = Path(option["--run-dir"])
        run_dir.mkdir()
        seconds = 1.0 / int(option["--tp"]) / int(option["--pp"])
        event = {
            "event": self.kind, "step_seconds": seconds, "predicted_step_seconds": 0.8 * seconds,
            "communication_share": 0.4, "bubble_share": 0.1, "utilisation": 0.5, "predicted_utilisation": 0.6,
        }  # fmt: skip
        (run_dir / "metrics.jsonl").write_text('{"event": "started"}\n' + json.dumps(event) + "\n")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> type[_FakeCluster]:
    monkeypatch.setattr(bench_hybrid, "Cluster", _FakeCluster)
    monkeypatch.setattr(_FakeCluster, "ran", [])
    return _FakeCluster


def test_every_composition_has_a_line_of_measured_and_predicted_figures(
    cluster: type[_FakeCluster], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    assert bench_hybrid.main(["--json", str(out)]) == 0
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if "|" in line]
    assert [row[:2] for row in rows[2:]] == [
        ["DP only", "1 x 1 x 8"],
        ["TP, in the node", "2 x 1 x 4"],
        ["PP only", "1 x 8 x 1"],
        ["hybrid", "2 x 2 x 2"],
        ["hybrid, top-k 1 %", "2 x 2 x 2"],
    ]
    assert rows[5][2:] == ["250", "200", "+25 %", "40 %", "10 %", "50 %", "60 %", "4.00"]
    assert said.startswith("emulated:")
    assert all("--emulate" in argv for argv in cluster.ran)
    assert ["topk:0.01" in argv for argv in cluster.ran] == [False] * 4 + [True]
    assert len(json.loads(out.read_text())["lines"]) == 5


def test_every_composition_is_a_mesh_of_the_cluster() -> None:
    for composition in COMPOSITIONS.values():
        mesh = Mesh.over(Topology.virtual(4, 2), pp=composition.pp, tp=composition.tp, outer="dp")
        assert mesh.dp * mesh.pp * mesh.tp == 8


def test_a_training_that_emulates_nothing_is_an_error(
    cluster: type[_FakeCluster], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "kind", "final")
    assert bench_hybrid.main([]) == 1
    assert "no emulated figures" in capsys.readouterr().err


def test_an_unknown_composition_is_refused() -> None:
    with pytest.raises(SystemExit, match="2"):
        bench_hybrid.main(["--compositions", "dp,cp"])
