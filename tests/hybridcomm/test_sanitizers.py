"""The engine without Python under sanitizers: builds tests/csrc/engine_test.cpp and runs it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]

needs_time = pytest.mark.skipif(
    not os.environ.get("HYBRIDCOMM_SANITIZERS"),
    reason="sanitizer builds take a minute each: set HYBRIDCOMM_SANITIZERS=1 (make verify does)",
)


@needs_time
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_engine_is_clean(tmp_path: Path, kind: str) -> None:
    cmake = shutil.which("cmake") or "cmake"
    build = tmp_path / "build"
    configure = [
        cmake,
        f"-S{ROOT}",
        f"-B{build}",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        f"-DHYBRIDCOMM_SANITIZE={kind}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    subprocess.run(configure, check=True, capture_output=True, timeout=300)
    make = [cmake, "--build", str(build), "--target", "hybridcomm_engine_test", "-j2"]
    made = subprocess.run(make, check=False, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stdout + made.stderr
    env = {**os.environ, "TSAN_OPTIONS": f"halt_on_error=1 suppressions={ROOT / 'tests/csrc/tsan.supp'}"}
    # Older thread sanitizers know no layout with much address randomisation.
    shell = ["setarch", platform.machine(), "-R"] if kind == "thread" and shutil.which("setarch") else []
    done = subprocess.run(
        [*shell, str(build / "hybridcomm_engine_test")],
        env=env,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout
