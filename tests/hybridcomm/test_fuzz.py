"""The fuzz targets run, and see a planted bug; `make fuzz` and `make verify` run them for longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hybridcomm.kernels.payload import Codec
from tests import fuzz, verify
from tests.fuzz import Result, Target
from tests.fuzz_mutants import MUTANTS, Mutant
from tests.native import ROOT

needs_clang = pytest.mark.skipif(not fuzz.CLANG, reason="fuzzing needs clang")


@needs_clang
@pytest.mark.timeout(900)
def test_every_target_runs_clean() -> None:
    """In the folder that `make fuzz` has built already."""
    targets = fuzz.prepare()
    names = [target.name for target in targets]
    assert names[-4:] == ["link", "handshake", "control", "messages"]
    assert f"decode {Codec.TOPK.name.lower()}" in names
    for result in fuzz.fuzz(targets, runs=2000, jobs=1):
        assert result.passed, result.output
        assert result.executions >= 2000
        assert result.coverage > 20  # edges of what is tested alone: the control channel has few


def test_bugs_are_planted_where_they_are_meant_to(tmp_path: Path) -> None:
    """What is to be changed is there, once; a change of the sources must move the bug along."""
    for mutant in MUTANTS:
        folder = tmp_path / mutant.folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in (ROOT / mutant.folder).iterdir():
            if path.suffix in (".cpp", ".h"):
                (folder / path.name).write_text(path.read_text())
        path, before = fuzz.plant(tmp_path, mutant)
        assert mutant.after in path.read_text()
        assert mutant.before in before
        path.write_text(before)
    nowhere = Mutant(what="x", target="link", folder="hybridcomm/csrc", before="no such line", after="")
    with pytest.raises(RuntimeError, match="plant it anew"):
        fuzz.plant(tmp_path, nowhere)


def test_without_clang_nothing_is_said_to_have_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "CLANG", "")
    assert fuzz.main([]) == 2
    assert "nothing ran: fuzzing needs clang++" in capsys.readouterr().out


def test_a_crash_is_a_failure(tmp_path: Path) -> None:
    script = "import sys; print('stat::number_of_executed_units: 7', file=sys.stderr); sys.exit({})"
    target = Target(name="x", program=Path(sys.executable), arguments=("-c", script.format(77)))
    crashed = fuzz.run(target, tmp_path, timeout=30)
    assert (crashed.passed, crashed.executions) == (False, 7)
    clean = Target(name="x", program=Path(sys.executable), arguments=("-c", script.format(0)))
    assert fuzz.run(clean, tmp_path, timeout=30).passed
    page = fuzz.table([crashed], [Result(name="bug", passed=False, executions=9, seconds=1)])
    assert "| x | 7 |" in page
    assert "**FAILED**" in page
    assert "**not found**" in page


def test_the_command_line_knows_its_targets() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--runs" in done.stdout


def test_every_codec_is_fuzzed_in_one_step_of_the_long_run() -> None:
    codecs = [codec for step in verify.DECODERS.values() for codec in step]
    assert sorted(codecs) == sorted(c.name.lower() for c in Codec if c not in (Codec.NONE, Codec.CUSTOM))
