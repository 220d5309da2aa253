"""The command itself: four ranks as two nodes, torchrun, the peer, and what it says when something is
wrong."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.numerics import gamma
from tests.train.builders import write_tables

ROOT = Path(__file__).parents[2]
SMALL = [
    *(
        "--epochs",
        "2",
        "--batch-size",
        "16",
        "--model.dim",
        "16",
        "--model.hidden",
        "16",
        "--model.dropout",
        "0",
    ),
    *(
        "--synthetic.users",
        "61",
        "--synthetic.items",
        "60",
        "--synthetic.clusters",
        "4",
        "--wire.timeout",
        "60",
    ),
]
pytestmark = pytest.mark.timeout(400)  # a rank takes seconds to load torch, more on a busy machine
LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "HYBRIDCOMM_STORE",
    "HYBRIDCOMM_NODES",
)


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command from the checkout's root, without what a launcher around the tests may have set."""
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHED} | environment
    env["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=380, check=False
    )


def train(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "train.run", *arguments], **environment)


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def final(folder: Path, *arguments: str) -> dict[str, Any]:
    done = train(*SMALL, "--run-dir", str(folder), *arguments)
    assert done.returncode == 0, done.stderr
    return events(folder, "final")[0]


def test_four_ranks_as_two_nodes(tmp_path: Path) -> None:
    done = train(*SMALL, "--run-dir", str(tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    for word in (
        "popularity",
        "best reachable",
        "samples/s",
        "MB/step",
        "exposed communication",
        "topk:0.01",
    ):
        assert word in done.stdout
    (values,) = events(tmp_path / "a", "final")
    assert values["users"] == 61
    assert values["steps"] == 2 * 4
    assert len(events(tmp_path / "a", "step")) == values["steps"]
    assert values["wire_ratio"] > 1
    shares = [value for name, value in values.items() if name.endswith("_share")]
    assert sum(shares) == pytest.approx(1.0)
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    assert settings["nproc"] == 4
    again = train(*SMALL, "--run-dir", str(tmp_path / "a"))
    assert again.returncode == 2
    assert "holds the metrics of another run" in again.stderr


def test_dense_runs_do_not_depend_on_ranks_or_backend(tmp_path: Path) -> None:
    dense = ["--compress", "none"]
    one = final(tmp_path / "one", *dense, "--nproc", "1", "--nodes", "1")
    three = final(tmp_path / "three", *dense, "--nproc", "3", "--nodes", "2", "--microbatches", "2")
    peer = final(tmp_path / "peer", *dense, "--nproc", "2", "--nodes", "2", "--comm", "ddp")
    # Eight steps of Adam from one gradient that differs in its last bits; a step counted twice changes
    # percents.
    for other in (three, peer):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert other["users"] == one["users"]
        assert other["popularity_ndcg"] == one["popularity_ndcg"]
    assert one["wire_nbytes_per_step"] == 0
    assert peer["wire_nbytes_per_step"] is None


MESHES = [
    "--nproc 8 --nodes 2 --pp 2 --tp 2",
    "--nproc 4 --nodes 2 --pp 2 --outer dp --schedule 1f1b --microbatches 3",
    "--nproc 2 --nodes 1 --tp 2 --sequence True",
    "--nproc 4 --nodes 2 --pp 2 --model.layers 2",  # a zbv whose last stage is the shared table alone
    "--nproc 8 --nodes 2 --pp 2 --tp 2 --split-head True --schedule 1f1b+1",
]
SMOOTH = "--compress none --max-steps 3 --model.init-std 0.3 --optim.eps 1 --optim.lr 0.5"
"""Adam's epsilon is large beside the gradients, so their last bits stay last bits in the updates."""


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """By number of layers."""

    @functools.cache
    def run(layers: str) -> dict[str, Any]:
        options = (*SMOOTH.split(), "--model.layers", layers)
        return final(tmp_path_factory.mktemp("alone") / "one", *options, "--nproc", "1", "--nodes", "1")

    return run


def fp32_error(steps: int) -> float:
    """Of two trainings in different orders of sums, relatively: per layer, forward and backward, four products of up to
    64 terms and norms of 16; 60 items; the sum over a step's predictions, at most 16 users of 50. Both err."""
    chain = 2 * (3 * (4 * 64 + 2 * 16) + 60 + 64) + 16 * 50
    return 2 * gamma(steps * chain, "float32")


@pytest.mark.parametrize("options", MESHES)
def test_stages_and_shared_layers_train_as_one_process(
    tmp_path: Path, options: str, one_process: Callable[[str], dict[str, Any]]
) -> None:
    chosen = options.split() if "--model.layers" in options else [*options.split(), "--model.layers", "3"]
    one, other = one_process(chosen[-1]), final(tmp_path / "mesh", *SMOOTH.split(), *chosen)
    assert other["loss"] == pytest.approx(one["loss"], rel=fp32_error(3))
    for name in ("users", "steps", "validation_ndcg", "ndcg"):
        assert other[name] == one[name]
    shares = {name: value for name, value in other.items() if name.endswith("_share")}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert (shares["waiting_share"] > 0) is ("--pp" in options)


def test_control_a_layer_left_out_is_noticed(one_process: Callable[[str], dict[str, Any]]) -> None:
    whole, fewer = one_process("3"), one_process("2")
    assert fewer["loss"] != pytest.approx(whole["loss"], rel=fp32_error(3))
    assert fewer["ndcg"] != whole["ndcg"]


def test_a_profile_is_written_and_steps_are_told(tmp_path: Path) -> None:
    options = "--nproc 4 --nodes 2 --pp 2 --model.layers 3 --compress none --profile True"
    done = train(*SMALL, "--run-dir", str(tmp_path / "p"), *options.split())
    assert done.returncode == 0, done.stderr
    assert "where a step went" in done.stdout
    assert "emulated" not in done.stdout
    assert {path.suffix for path in (tmp_path / "p").iterdir()} >= {".json", ".png", ".svg"}
    trace = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert {event["pid"] for event in trace["traceEvents"]} == {0, 1, 2, 3}
    names = [event["name"] for event in trace["traceEvents"] if event["pid"] == 0]
    assert names.count("optimizer") == 1
    rows = events(tmp_path / "p", "step_times")
    assert [row["rank"] for row in rows] == [0, 1, 2, 3]
    assert all(row["input_grad"] > 0 and row["optimizer"] > 0 for row in rows)


def test_what_is_emulated_is_called_so(tmp_path: Path) -> None:
    options = "--nproc 4 --nodes 2 --pp 2 --model.layers 3 --emulate 0.002 --max-steps 2 --profile True"
    done = train(*SMALL, "--run-dir", str(tmp_path / "e"), *options.split())
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "where a step went" in line or "zbv" in line]
    assert sum(line.startswith("emulated: ") for line in told) == 2
    assert "predicted" in done.stdout
    assert "NDCG" not in done.stdout
    (figures,) = events(tmp_path / "e", "emulated")
    assert figures["predicted_step_seconds"] > 0
    assert all(row["emulated"] for row in events(tmp_path / "e", "step_times"))
    assert json.loads((tmp_path / "e" / "profile.json").read_text())["otherData"]["emulated"]


def test_joins_under_torchrun(tmp_path: Path) -> None:
    done = run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "train.run", *SMALL),
            *("--run-dir", str(tmp_path / "t")),
        ],
        HYBRIDCOMM_NODES="2",
    )
    assert done.returncode == 0, done.stderr
    assert events(tmp_path / "t", "final")[0]["wire_ratio"] > 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--epoch", "3"], 2, "unknown option --epoch; did you mean --epochs?"),
        (["--compress", "tpok:0.1"], 2, "did you mean 'topk'"),
        (["--synthetic.users", "3"], 2, "4 ranks but only 3 users"),
        (["--tp", "3"], 2, "--tp 3 --pp 1: 4 ranks are no multiple of 3; tp * pp may be 1, 2, 4"),
        (["--tp", "4"], 2, "node 0 has 2 ranks, which 4 does not divide"),
        (
            ["--pp", "4", "--model.layers", "2"],
            2,
            "--pp 4 --schedule zbv: 2 layers, embedding and head cannot be",
        ),
        (["--pp", "2", "--schedule", "zvb"], 2, "no schedule 'zvb'; there are gpipe, 1f1b"),
        (["--schedule", "zbv"], 2, "--schedule and --chunks act on a pipeline: pass --pp too"),
        (["--data", "/no/such/folder"], 1, "/no/such/folder: no such data directory"),
    ],
)
def test_mistakes_give_one_line_and_no_traceback(arguments: list[str], code: int, message: str) -> None:
    done = train(*arguments)
    assert done.returncode == code
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("train.run: error: ")
    assert message in line


def test_malformed_data_is_told_once_by_all_ranks_together(tmp_path: Path) -> None:
    rows = "".join(f"u{user}\ti{item}\t{item}\n" for user in range(5) for item in range(4))
    folder = write_tables(
        tmp_path / "data", "user_id\titem_id\tposition\n" + rows.replace("u3\ti2\t2", "u3\ti2\tx")
    )
    alone = train("--data", str(folder))
    leader = train("--data", str(folder), RANK="0", WORLD_SIZE="2")
    other = train("--data", str(folder), RANK="1", WORLD_SIZE="2")
    assert [done.returncode for done in (alone, leader, other)] == [1, 1, 1]
    for done in (alone, leader):
        (line,) = done.stderr.strip().splitlines()
        assert "interactions.tsv.gz: line 16: position 'x' is not an integer" in line
    assert not other.stderr


def test_divergence_ends_in_one_line_per_rank(tmp_path: Path) -> None:
    # An infinite learning rate is refused by nobody, and breaks the weights in the first step.
    done = train(*SMALL, "--run-dir", str(tmp_path / "d"), "--optim.lr", "1e38", "--optim.warmup-steps", "0")
    assert done.returncode == 1
    assert "not finite" in done.stderr
    assert "train.run: error: " in done.stderr
    assert "Traceback" not in done.stderr
