"""``python -m hybridcomm.bench``: its columns, its bus factors, and that a wrong result shows up in #wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybridcomm import collective_plans as plans
from hybridcomm.bench import report
from hybridcomm.bench.__main__ import main
from hybridcomm.bench.cases import COLLECTIVES, Case, Collective, Run
from hybridcomm.bench.inputs import DTYPES, OPS, array_of, exact, pattern
from hybridcomm.bench.measure import Row, measure
from hybridcomm.bench.options import parse, sizes
from hybridcomm.compress import resolve
from hybridcomm.context import Context
from hybridcomm.errors import UnsupportedError
from hybridcomm.kernels.spec import CODECS
from hybridcomm.topology import Topology
from tests.engine_ranks import each_rank, engine_contexts

ROOT = Path(__file__).parents[2]
_SETTINGS = {"powersgd": "powersgd:1"}
"""Of codecs whose name alone is no text."""


def _measured(topology: Topology, *cases: Case) -> list[list[Row]]:
    with engine_contexts(topology) as contexts:

        def body(rank: int) -> list[Row]:
            return [measure(contexts[rank], case, iters=2, warmup=1, checks=2) for case in cases]

        rows = each_rank(body, topology.world_size)
    for result in rows:
        if isinstance(result, BaseException):
            raise result
    return rows


def test_the_header_is_that_of_nccl_tests() -> None:
    names, units = report.header(compressed=False).splitlines()
    assert names.split() == ["#", "size", "count", "type", "redop", "time", "algbw", "busbw", "#wrong"]
    assert units.split() == ["#", "(B)", "(elements)", "(us)", "(GB/s)", "(GB/s)"]
    lossy = report.header(compressed=True).split("\n")[0].split()
    assert lossy == ["#", "size", "count", "type", "redop", "time", "wirebytes", "ratio", "effbw", "err"]


@pytest.mark.parametrize(
    ("name", "factor"),  # nccl-tests' PERFORMANCE.md, for 4 ranks
    [
        ("allreduce", 1.5),
        ("broadcast", 1.0),
        ("all_gather", 0.75),
        ("reduce_scatter", 0.75),
        ("reduce", 1.0),
        ("gather", 0.75),
        ("scatter", 0.75),
        ("all_to_all", 0.75),
    ],
)
def test_bus_factors_are_those_of_nccl_tests(name: str, factor: float) -> None:
    assert COLLECTIVES[name].bus_factor(4) == factor


def test_every_collective_has_its_factor_checked() -> None:
    assert len(COLLECTIVES) == 8


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_crafted_sums_are_exact_in_their_dtype(dtype: str, op: str) -> None:
    parts = [pattern(rank, world_size=5, dtype=dtype, op=op) for rank in range(5)]
    assert len({part.tobytes() for part in parts}) == 5
    for numbers in (*parts, sum(parts), exact(op, world_size=5, dtype=dtype)):
        stored = array_of(numbers, len(numbers), dtype)
        kept = stored.double().numpy() if dtype == "bfloat16" else stored
        assert np.array_equal(kept.astype(np.int64), numbers)


@pytest.mark.parametrize("sizes_of_nodes", [[2, 2], [2, 1], [3]])
def test_every_collective_is_measured_and_right(sizes_of_nodes: list[int]) -> None:
    topology = Topology.from_sizes(sizes_of_nodes)
    world = topology.world_size
    cases = [
        Case(collective=name, numel=997 * world, dtype=dtype, op=op)
        for name in COLLECTIVES
        for dtype, op in (("float32", "sum"), ("bfloat16", "mean"))
    ]
    by_rank = _measured(topology, *cases)
    assert all(rows == by_rank[0] for rows in by_rank)  # all ranks got the slowest rank's time
    for case, row in zip(cases, by_rank[0], strict=True):
        assert row.wrong == 0, row
        assert row.seconds > 0
        assert row.algbw == pytest.approx(row.nbytes / row.seconds)
        assert row.busbw == pytest.approx(row.algbw * COLLECTIVES[case.collective].bus_factor(world))


def test_corrupted_elements_show_up_in_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = COLLECTIVES["allreduce"]

    def prepare(context: Context, case: Case) -> Run:
        run = right.prepare(context, case)

        def call() -> None:
            run.call()
            if context.rank == 1:
                run.out[[3, 5]] += 1

        return replace(run, call=call)

    corrupt = Collective(prepare=prepare, bus_factor=right.bus_factor, reduces=True)
    monkeypatch.setitem(COLLECTIVES, "allreduce", corrupt)
    rows = _measured(Topology.virtual(2, 1), Case(collective="allreduce", numel=64, dtype="int32", op="sum"))
    assert [row.wrong for (row,) in rows] == [4, 4]  # two elements on one rank, in each of two checks
    assert "FAILED" in report.footer(rows[0])


def test_an_element_that_was_never_written_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = COLLECTIVES["all_gather"]
    lazy = replace(right, prepare=lambda *args: replace(right.prepare(*args), call=lambda: None))
    monkeypatch.setitem(COLLECTIVES, "all_gather", lazy)
    case = Case(collective="all_gather", numel=64, dtype="float32", op="sum")
    assert _measured(Topology.virtual(1, 2), case)[0][0].wrong == 2 * 2 * 64


@pytest.mark.parametrize(
    ("compress", "ratio", "error"),
    [("topk:0.01", (50, 200), (0.1, 1)), ("int8", (3.9, 4), (1e-4, 0.1)), ("sign1", (28, 31), (0.1, 1))],
)
def test_a_compressed_run_counts_its_bytes_and_claims_no_busbw(
    compress: str, ratio: tuple[float, float], error: tuple[float, float]
) -> None:
    numel = 1 << 15
    case = Case(collective="allreduce", numel=numel, dtype="float32", op="sum", compress=compress)
    row = _measured(Topology.virtual(2, 1), case)[0][0]
    assert row.busbw is None
    assert row.dense_nbytes == 2 * 4 * numel  # 2 (M - 1) / M * S from each of the two nodes
    assert ratio[0] < row.dense_nbytes / row.wire_nbytes < ratio[1]
    assert row.err is not None
    assert error[0] < row.err < error[1]  # more than nothing, less than all
    text = report.line(row).split()
    assert len(text) == 9
    assert float(text[6]) == pytest.approx(row.dense_nbytes / row.wire_nbytes, abs=0.06)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_every_codec_has_its_columns(codec: str, tmp_path: Path) -> None:
    """Bytes are the plan's and their framing; the error is that of a lossy call, two-sided."""
    numel, text = 1 << 14, _SETTINGS.get(codec, codec)
    topology = Topology.virtual(2, 1)
    case = Case(collective="allreduce", numel=numel, dtype="float32", op="mean", compress=text)
    row = _measured(topology, case)[0][0]
    compressor = resolve(text)
    assert compressor is not None
    plan = plans.allreduce(topology, numel, op="mean", compressor=compressor)
    payloads = plan.wire_nbytes(compressor.nbytes)
    assert payloads < row.wire_nbytes <= payloads + 64 * len(plan.steps)
    assert row.dense_nbytes == 2 * 4 * numel
    assert row.err is not None
    assert 0 < row.err < (np.inf if compressor.contraction is None else 1)
    names, cells = report.header(compressed=True).split("\n")[0].split()[1:], report.line(row).split()
    assert len(names) == len(cells)
    assert float(cells[names.index("ratio")]) == pytest.approx(row.dense_nbytes / row.wire_nbytes, abs=0.06)
    assert float(cells[names.index("effbw")]) == pytest.approx(row.nbytes / row.seconds / 1e9, abs=6e-4)
    report.write_json(tmp_path / "rows.json", [row], world_size=2)
    (written,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (written["compress"], written["wire_nbytes"], written["busbw"]) == (text, row.wire_nbytes, None)
    report.write_plot(tmp_path / "rows.svg", [row])
    assert "effbw" in (tmp_path / "rows.svg").read_text()


def test_sizes_grow_by_the_factor_and_are_whole_parts() -> None:
    options = parse(["-b", "1K", "-e", "16K", "-f", "4"])
    assert sizes(options, multiple=1) == [256, 1024, 4096]
    assert sizes(options, multiple=3) == [255, 1023, 4095]
    assert sizes(parse(["-b", "1", "-e", "8", "-f", "2"]), multiple=1) == [1, 2]


@pytest.mark.parametrize(
    "argv",
    [
        ["-b", "2M", "-e", "1M"],
        ["-f", "1"],
        ["-n", "0"],
        ["-b", "many"],
        ["--collective", "alltoall"],
        ["--nodes", "2"],
        ["--probe", "--plot", "x.png"],
        ["--compress", "topk:0.01", "--dtype", "float64"],
        ["--compress", "topk:0.01", "--collective", "broadcast"],
    ],
)
def test_options_that_cannot_act_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(argv)
    assert "error:" in capsys.readouterr().err


def test_without_launcher_and_nproc_it_says_what_to_give(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main([]) == 2
    assert "--nproc" in capsys.readouterr().err


def test_plot_without_matplotlib_says_so_before_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match="pip install matplotlib"):
        report.check_plot()
    assert main(["--nproc", "2", "--plot", "x.png"]) == 2


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_it_starts_its_own_ranks_and_writes_its_figures(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "hybridcomm.bench", "--nproc", "4", "--nodes=2", "-b", "1K", "-e", "4K"]
    argv += ["-n", "2", "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False, env=_environment())
    assert done.returncode == 0, done.stderr
    assert "# Wrong elements: 0 OK" in done.stdout
    figures = json.loads((tmp_path / "b.json").read_text())
    assert figures["topology"] == "0,1|2,3"
    assert len(figures["rows"]) == 2 * len(COLLECTIVES)
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_it_prints_what_it_probed(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "hybridcomm.bench", "--nproc", "2", "--nodes", "2", "--probe"]
    argv += ["--json", str(tmp_path / "p.json")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False, env=_environment())
    assert done.returncode == 0, done.stderr
    assert "inter_node: alpha" in done.stdout
    assert "intra_node: no such link" in done.stdout
    figures = json.loads((tmp_path / "p.json").read_text())
    assert Topology.parse(figures["topology"]).inter_node.beta
    decided = [line.split() for line in done.stdout.splitlines() if line.startswith("inter_node  ")]
    assert [words[1] for words in decided] == [str(4 * found["numel"]) for found in figures["decisions"]]


def test_compress_auto_prints_what_is_active() -> None:
    argv = [sys.executable, "-m", "hybridcomm.bench", "--nproc", "2", "--nodes", "2"]
    argv += ["--compress", "auto:int8,sign1", "-b", "4K", "-e", "4K", "-n", "2"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False, env=_environment())
    assert done.returncode == 0, done.stderr
    assert "# inter_node  4096" in done.stdout
    assert "int8/g128" in done.stdout
    assert done.stdout.splitlines()[-1].split()[0] == "4096"


def test_it_runs_under_torchrun() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    argv += ["--master-port", str(port), "-m", "hybridcomm.bench", "-b", "1K", "-e", "1K", "-n", "2"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False, env=_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("# Wrong elements: 0 OK") == 1
