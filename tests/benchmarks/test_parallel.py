"""The comparison of parallelisms: everyone trains the same model, verdicts are what figures say."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_parallel
from benchmarks.parallel import contest, plain
from benchmarks.parallel.case import LR, Case, Competitor, reference
from benchmarks.parallel.contest import Contest
from benchmarks.parallel.splits import cuts, parts_of, promising
from model.vocab import Items, item_loss
from train.pipeline import StageCost, make_schedule

CASE = Case(items=60, layers=2, dim=16, rows=1, microbatches=2)


class PlainAlone(Competitor):
    """The peers' layers in one process; ``bug`` plants one."""

    name = "plain"

    def __init__(self, *, tiles: bool = False, bug: str = "") -> None:
        self._layers, self._tiles, self._bug = plain.layers(CASE, tiles=tiles), tiles, bug
        if bug == "a layer is dropped":
            del self._layers[1]
        parameters = [p for layer in self._layers for p in layer.parameters()]
        self._optimizer = torch.optim.SGD(parameters, lr=LR)

    def step(self) -> float:
        self._optimizer.zero_grad()
        total = 0.0
        batches = CASE.batches()
        if self._bug == "a microbatch counts twice":
            batches[1] = batches[0]
        for batch in batches:
            x = torch.nn.Sequential(*self._layers)(batch.items)
            loss = (
                item_loss(x, self._layers[-1].table, batch.targets, Items(count=CASE.items))
                if self._tiles
                else torch.nn.functional.cross_entropy(x, batch.targets, reduction="sum")
            )
            scale = 2 if self._bug == "gradients count twice" else 1
            (loss * scale / CASE.predictions).backward()
            total += loss.item()
        self._optimizer.step()
        return total / CASE.predictions


def checked(competitor: Competitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "_timed", lambda each: (0.0, each.step()))
    monkeypatch.setattr(Contest, "__post_init__", lambda _: None)
    Contest(case=CASE, expected=reference(CASE, 2)).check(competitor)


@pytest.mark.parametrize("tiles", [False, True])
def test_the_peers_model_is_ours(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(PlainAlone(tiles=tiles), monkeypatch)


BUGS = ["a layer is dropped", "a microbatch counts twice", "gradients count twice"]


@pytest.mark.parametrize("bug", BUGS)
def test_control_a_peer_that_computes_something_else_is_refused(
    bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match="one process"):
        checked(PlainAlone(bug=bug), monkeypatch)


def test_shares_of_a_regrouped_weight_have_a_share_of_each_section() -> None:
    weight = torch.arange(24.0)[:, None]
    first, second = plain.regroup(weight, 3, 2).chunk(2)
    assert first[:, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    assert second[:, 0].tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]


def test_the_tolerance_is_between_rounding_and_what_matters() -> None:
    """In fp32 one process is inside it, by far; losses of neighbouring steps are not."""
    first, second = reference(CASE, 2)
    assert CASE.tolerance(first) < abs(first - second)
    assert CASE.tolerance(first) > torch.finfo(torch.float32).eps * first


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("layers", [2, 5, 8])
def test_every_cut_is_there_once_and_is_the_whole_model(layers: int, stages: int) -> None:
    found = cuts(layers, stages)
    assert len(set(found)) == len(found) == math.comb(layers + 1, stages - 1)
    for cut in found:
        parts = parts_of(cut)
        for part in parts:
            part.check(layers)
        assert list(itertools.chain(*(part.layers for part in parts))) == list(range(layers))
        assert [part.embeds for part in parts] == [True] + [False] * (stages - 1)
        assert [part.scores for part in parts] == [False] * (stages - 1) + [True]


def test_the_best_cut_by_simulation_balances_layers_and_head() -> None:
    layer, head = (StageCost(forward=t, input_grad=t, weight_grad=t) for t in (1.0, 4.0))
    case = Case(items=60, layers=8)
    assert promising(case, "1f1b", (layer, head), count=1) == [(6, 2)]
    assert promising(case, "1f1b, split head", (layer, head), count=1) == [(4, 4)]
    assert len(promising(case, "zbv", (layer, head), count=3)) == 3
    assert len(cuts(8, make_schedule("zbv", 2, 8).stages)) > 3


def line(name: str, ms: float, choice: str = "", exposed: float = 0.0) -> dict[str, object]:
    return {"name": name, "choice": choice, "ms": ms, "exposed_ms": exposed}


@pytest.mark.parametrize(("ms", "verdict"), [(100.0, "1 met"), (99.0, "1 missed")])
def test_a_peers_best_stands_beside_our_best(ms: float, verdict: str) -> None:
    lines = [
        line("hybridcomm", 120.0),
        line("hybridcomm", 100.0, "zbv"),
        line("P", ms, "1f1b"),
        line("P", 150.0),
    ]
    result = {
        "comparison": "pp", "items": 2000, "lines": lines, "limit": line("one core", 180.0),
        "absent": {"Q": "it is not installed"},
    }  # fmt: skip
    first, second = bench_parallel.rows(result)
    assert first[1:9] == ["P", "1f1b", f"{ms:.1f}", "zbv", "100.0", f"{ms / 100:.2f}", verdict, "90.0"]
    assert second[1:3] == ["Q", "not compared: it is not installed"]
    assert len(first) == len(second)


def test_exposed_communication_has_a_row_of_its_own() -> None:
    lines = [line("hybridcomm", 90.0, "TCP", 4.0), line("DDP, gloo", 110.0, "", 20.0)]
    result = {"comparison": "dp", "items": 9, "lines": lines, "limit": line("no average", 80.0)}
    step, exposed = bench_parallel.rows(result, 2.0)
    assert (step[6], step[7], step[9]) == ("1.22", "", "1.12")
    assert (exposed[6], exposed[7], exposed[9]) == ("5.00", "2 met", "2.00")


def test_what_cannot_be_measured_is_refused() -> None:
    for argv in (["--comparisons", "pp,ep"], ["--dim", "48"]):
        with pytest.raises(SystemExit, match="2"):
            bench_parallel.main(argv)


@pytest.mark.timeout(300)
def test_two_ranks_measure_every_comparison(tmp_path: Path) -> None:
    """Small, and once: everyone's losses are compared on the way."""
    argv = [
        sys.executable,
        "-m",
        "benchmarks.bench_parallel",
        "--items",
        "64",
        "--layers",
        "2",
        "--dim",
        "32",
    ]
    argv += ["--rows", "1", "--microbatches", "2", "--rounds", "1", "--cuts", "1"]
    done = subprocess.run(
        [*argv, "--json", str(tmp_path / "figures.json")],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=290, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for peer in (
        "torch.distributed.pipelining",
        "DeepSpeed PipelineModule",
        "DTensor, loss_parallel",
        "DDP, gloo",
    ):
        assert f" {peer} |" in done.stdout
