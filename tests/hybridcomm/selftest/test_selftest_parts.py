"""Parts of the engine's self-test without a GPU: the board, comparisons, which cases run where, the command."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridcomm.bootstrap import World
from hybridcomm.errors import StallError, UnsupportedError
from hybridcomm.selftest import __main__ as command
from hybridcomm.selftest.board import Board
from hybridcomm.selftest.cases import Case, conformance
from hybridcomm.selftest.gpu import TorchGpu, nccl_peer
from hybridcomm.selftest.kernels import SPECS
from hybridcomm.selftest.orders import calls
from hybridcomm.selftest.rank import near
from hybridcomm.selftest.report import text, verdict
from hybridcomm.selftest.runner import FAILED, LEFT_OUT, NOT_RUN, PASSED, Result
from hybridcomm.store import DirectoryStore
from tests.engine_ranks import each_rank

ALONE = World(rank=0, world_size=1, store=None)


def boards(directory: Path, body: Callable[[Board], Any], world: int = 3, patience: float = 5.0) -> list[Any]:
    store = DirectoryStore(directory)
    return each_rank(
        lambda rank: body(Board(World(rank=rank, world_size=world, store=store), patience=patience)), world
    )


def test_all_ranks_read_what_each_said(tmp_path: Path) -> None:
    for run in range(2):  # a second run in the same store reads nothing of the first

        def body(board: Board, run: int = run) -> list[Any]:
            return [board.exchange({"run": run, "round": i, "rank": board.rank}) for i in range(2)]

        wanted = [[{"run": run, "round": i, "rank": r} for r in range(3)] for i in range(2)]
        assert boards(tmp_path, body) == [wanted] * 3
    assert Board(ALONE, patience=1.0).exchange([1]) == [[1]]


def test_a_rank_that_says_nothing_is_waited_for_once(tmp_path: Path) -> None:
    def body(board: Board) -> Any:
        if board.rank == 1:
            return None
        return [board.exchange(board.rank) for _ in range(2)], board.gone

    wanted = [[0, None, 2], [0, None, 2]], {1}
    assert boards(tmp_path, body, patience=0.5) == [wanted, None, wanted]


def test_a_rank_that_comes_too_late_is_told(tmp_path: Path) -> None:
    given_up = threading.Event()

    def body(board: Board) -> Any:
        if board.rank == 1:
            given_up.wait(20)
        found = board.exchange(board.rank)
        given_up.set()
        return found

    results = boards(tmp_path, body, world=2, patience=0.3)
    assert results[0] == [0, None]
    assert isinstance(results[1], StallError)
    assert "went on without it" in str(results[1])


def test_without_rank_0_the_others_do_not_hang(tmp_path: Path) -> None:
    results = boards(tmp_path, lambda board: board.rank and board.exchange(1), world=2, patience=0.0)
    assert isinstance(results[1], StallError)
    assert results[1].missing == (0,)


def test_the_bound_of_a_sum_is_kept_and_is_not_wide() -> None:
    """The worst that three roundings can do passes; a unit in the last place of 64 terms' bound more does not."""
    want, scale = torch.full((8,), 3.0, dtype=torch.double), torch.full((8,), 3.0, dtype=torch.double)
    got = torch.full((8,), 3.0)
    assert list(near("x", got, want, scale, 2)) == []
    got[5] = 3.0 * (1 + 2**-23)
    assert list(near("x", got, want, scale, 2)) == []
    got[5] = 3.0 * (1 + 2**-20)
    assert "1 of 8 elements beyond the bound" in next(near("x", got, want, scale, 2))
    got[5] = torch.nan
    assert "1 of 8 elements beyond the bound" in next(near("x", got, want, scale, 2))


@pytest.mark.parametrize(
    ("options", "ranks", "nodes", "why"),
    [
        ({}, 1, 1, ""),
        ({"ranks": 2}, 1, 1, "needs 2 ranks"),
        ({"nodes": 2}, 4, 1, "needs 2 nodes"),
        ({"nodes": 2, "few": True}, 2, 1, ""),
        ({"nodes": 2, "few": True}, 3, 1, "needs 2 nodes"),
        ({"powers": 3}, 24, 2, ""),
        ({"powers": 3}, 72, 9, "would not be exact"),
        ({"powers": 3}, 64, 8, ""),
        ({"most": 127}, 128, 16, "would not be exact"),
    ],
)
def test_cases_are_left_out_where_they_mean_nothing(options: Any, ranks: int, nodes: int, why: str) -> None:
    said = Case(name="", body=lambda _: [], against="", **options).why_not(ranks, nodes)
    assert why in said
    assert bool(said) == bool(why)


def test_names_of_cases_are_their_own_and_every_codec_has_some() -> None:
    names = [case.name for case in conformance(SPECS, numel=1 << 12, seeds=range(3))]
    assert len(set(names)) == len(names)
    assert all(f"{spec}, gather, error feedback" in names for spec in SPECS)


def test_orders_differ_by_seed_and_mix_what_there_is() -> None:
    every = [calls(seed, SPECS, nodes=2, numel=1 << 13) for seed in range(60)]
    assert every == [calls(seed, SPECS, nodes=2, numel=1 << 13) for seed in range(60)]
    flat = [call for each in every for call in each]
    assert {call.compress for call in flat} == {None, *SPECS}
    assert {call.exchange for call in flat} == {"auto", "gather", "two_stage"}
    assert {call.second for call in flat} == {call.residual for call in flat} == {True, False}
    assert all(call.numel % 16 == 0 and 0 < call.numel <= 1 << 13 for call in flat)
    assert all(call.compress is None for call in calls(1, SPECS, nodes=1, numel=1 << 13))


def result(status: str, case: str = "a case", *reasons: str) -> Result:
    return Result(layout="0|1", case=case, against="exact values", status=status, reasons=reasons)


def test_a_verdict_is_good_only_where_something_passed_and_nothing_is_bad() -> None:
    assert verdict([result(PASSED)]) == "PASSED: 1 passed, 0 failed, 0 not run, 0 left out"
    assert verdict([result(PASSED), result(LEFT_OUT)]).startswith("PASSED")
    for bad in ([result(PASSED), result(FAILED)], [result(PASSED), result(NOT_RUN)], [result(LEFT_OUT)], []):
        assert verdict(bad).startswith("FAILED")


def test_a_report_says_why_and_what_differs_between_ranks() -> None:
    results = [
        result(PASSED, "good"),
        result(FAILED, "bad", "rank 1: value: x"),
        result(LEFT_OUT, "out", "why"),
    ]
    facts = [{"NCCL": "22703", "host": "a"}, {"NCCL": "22703", "host": "b"}, None]
    shown = text(results, [], facts, layouts=["0|1"])
    for part in (
        "| NCCL | 22703 |",
        "| rank 1 | host b |",
        "| rank 2 | has not said |",
        "**bad**, nodes 0|1\n\n```\nrank 1: value: x\n```",
        "| good | exact values | passed, 0.00 s |",
        "Left out (why): out.",
        "nodes 0\\|1 |",
    ):
        assert part in shown, part


@pytest.mark.parametrize("arguments", [[], ["engine"], ["--seeds", "3"], ["kernels"]])
def test_without_a_gpu_nothing_is_checked_and_that_is_said(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(arguments) == 2
    assert "no CUDA device: nothing was checked" in capsys.readouterr().out
    with pytest.raises(UnsupportedError, match="torch sees no GPU"):
        TorchGpu(0)


def test_a_dry_run_lists_cases_by_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["engine", "--nproc", "4", "--dry-run", "--only", "int8", "--abort"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "nodes 0,1,2,3: ",
        "nodes 0,1|2,3: ",
        "nodes 0|1|2|3: ",
        "int8, two-stage, error feedback: against host's bits",
        "int8, gather, error feedback: left out, needs 2 nodes",
        "at the end: an abort on one rank",
        "dry run: nothing was run; ",
    ):
        assert part in shown, part
    assert shown.count("against host's bits") > 20


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nodes", "3"], "--nodes 3: must be between 1 and the 1 ranks"),
        (["--numel", "100"], "must be a multiple of 4096"),
        (["--only", "powersgd:8"], "--only powersgd:8: kernels are shipped for"),
        (["--rounds", "0"], "--rounds at least 1"),
    ],
)
def test_options_that_cannot_act_are_refused(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["engine", *arguments])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_ranks_are_started_with_the_other_options(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(command, "_no_gpu", lambda: "")
    monkeypatch.setattr(command, "launch", lambda *given, **named: started.append((given, named)) or 7)
    assert command.main(["--seeds", "2", "--nproc", "3", "--nodes", "1", "3"]) == 7
    assert command.main(["engine", "--nproc=2", "--sizes"]) == 7
    first = ["-m", "hybridcomm.selftest", "all", "--seeds", "2", "--nodes", "1", "3"]
    second = ["-m", "hybridcomm.selftest", "engine", "--sizes"]
    assert started == [((first,), {"nproc": 3}), ((second,), {"nproc": 2})]
    with pytest.raises(SystemExit):
        command.main(["--nproc", "2", "--device", "1"])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        command.main(["--nproc", "2"])


def test_a_torch_without_nccl_has_no_peer() -> None:
    if torch.distributed.is_nccl_available():
        pytest.skip("this torch has NCCL, which would be started")
    with (
        pytest.raises(UnsupportedError, match="built without NCCL"),
        nccl_peer(ALONE, torch.device("cuda", 0), 1.0),
    ):
        pass
