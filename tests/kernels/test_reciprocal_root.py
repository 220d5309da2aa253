"""powersgd's 1 / sqrt(x) in integers, compiled for the host, against the processor's, for every mantissa."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native import ROOT

SOURCE = ROOT / "kernels" / "cuda" / "root.cuh"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
BUGS = {
    "a root too small stays": ("(rest > root) -", "0 -"),
    "a root too large stays": (" - (rest <= -root)", ""),
    "a quotient too small stays": ("(2 * rest > root) -", "0 -"),
    "a quotient too large stays": (" - (2 * rest < -root)", ""),
    "the quotient is mended once": ("i < 2", "i < 1"),
    "a step too few": ("i < 4", "i < 2"),
    "odd powers as even ones": ("const bool odd = (exponent & 1) != 0;", "const bool odd = false;"),
    "denormals as normal numbers": ("if (exponent != 0)", "if (true)"),
}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: nothing is compiled here")


def wrong(folder: Path, text: str) -> str:
    """What the program says of a source; empty if all is right."""
    assert COMPILER is not None
    (folder / "root.cuh").write_text(text, encoding="utf-8")
    program, main = folder / "root_test", ROOT / "tests" / "csrc" / "root_test.cpp"
    command = [COMPILER, "-std=c++17", "-O2", f"-I{folder}", str(main), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=100)
    assert ran.returncode == bool(ran.stdout), ran
    return ran.stdout


def test_every_mantissa_is_right(tmp_path: Path) -> None:
    assert wrong(tmp_path, SOURCE.read_text(encoding="utf-8")) == ""


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, tmp_path: Path) -> None:
    text = SOURCE.read_text(encoding="utf-8")
    was, becomes = BUGS[bug]
    assert was in text
    assert "instead of" in wrong(tmp_path, text.replace(was, becomes, 1))
