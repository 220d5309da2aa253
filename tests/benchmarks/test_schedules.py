"""The benchmark of pipeline schedules, small: its table and what must hold between its three figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.bench_schedules import main


def test_a_step_is_simulated_with_and_without_links(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "schedules.json"
    options = ["--ranks", "2", "--schedules", "1f1b,zbv", "--microbatches", "3", "--forward-ms", "4"]
    assert main([*options, "--kib", "4", "--rounds", "1", "--json", str(out)]) == 0
    told = capfd.readouterr().out
    lines = json.loads(out.read_text())["lines"]
    assert [line["schedule"] for line in lines] == ["1f1b", "zbv"]
    for line in lines:
        assert 0 < line["limit_s"] < line["simulated_s"]  # a message takes some time
        assert (
            line["limit_s"] < line["measured_s"]
        )  # computation is timed: nothing can be faster than free links
        assert 0 < line["limit_bubble"] < line["measured_bubble"] < 1
        assert f"{1e3 * line['simulated_s']:.1f}" in told
