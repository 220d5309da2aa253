"""The import contracts hold, and would notice if they did not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.repository.imports import kernel_leaks, lint_imports
from tests.repository.layout import ROOT, make_layout

pytest.importorskip("importlinter")


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return make_layout(tmp_path / "layout")


def plant(layout: Path, module: str, line: str) -> None:
    """Replaces a module's link by a copy with one more import."""
    target = layout / (module.replace(".", "/") + ".py")
    package = layout / module.partition(".")[0]
    if package.is_symlink():  # a linked folder: give it a body of its own
        source = package.resolve()
        package.unlink()
        package.mkdir()
        for entry in source.iterdir():
            (package / entry.name).symlink_to(entry)
    text = target.read_text()
    target.unlink()
    target.write_text(f"{text}\n{line}\n")


def test_contracts_hold(layout: Path) -> None:
    code, text = lint_imports(layout)
    assert code == 0, text
    assert "Contracts: " in text


def test_kernels_are_a_leaf(layout: Path) -> None:
    assert kernel_leaks(layout) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("hybridcomm.errors", "import model.config"),
        ("hybridcomm.errors", "from train import config"),
        ("model.config", "import train.config"),
        ("train.config", "import benchmarks.table"),
    ],
)
def test_an_import_against_the_direction_is_found(layout: Path, module: str, line: str) -> None:
    plant(layout, module, line)
    code, text = lint_imports(layout)
    assert code == 1
    assert module in text


@pytest.mark.parametrize("line", ["from hybridcomm import errors", "import train.config"])
def test_a_kernel_that_imports_the_library_is_found(layout: Path, line: str) -> None:
    kernels = layout / "hybridcomm" / "kernels"
    source = kernels.resolve()
    kernels.unlink()
    kernels.mkdir()
    for entry in source.iterdir():
        (kernels / entry.name).symlink_to(entry)
    plant(layout, "hybridcomm.kernels.spec", line)
    assert [leak.partition(" ")[0] for leak in kernel_leaks(layout)] == ["hybridcomm.kernels.spec"]


@pytest.mark.parametrize(
    "line", ["import kernels", "from kernels import spec", "import kernels.spec as spec"]
)
def test_a_top_level_kernels_is_banned(line: str) -> None:
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--stdin-filename",
        str(ROOT / "model" / "planted.py"),
        "-",
    ]
    result = subprocess.run(command, input=line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "TID251" in result.stdout
