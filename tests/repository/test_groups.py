"""Tests that share what is dear, or a machine-wide thing, stay on one worker: pytest and pytest-xdist have to fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_a_group_of_tests_is_one_workers(tmp_path: Path) -> None:
    marks = "@pytest.mark.xdist_group('one')\n@pytest.mark.parametrize('i', range(12))\n"
    (tmp_path / "test_grouped.py").write_text(f"import pytest\n{marks}def test(i): pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    workers = re.findall(r"\[(gw\d)\].*PASSED", done.stdout)
    assert len(workers) == 12, done.stdout + done.stderr
    assert len(set(workers)) == 1, "pin a pytest that pytest-xdist's loadgroup works with"
