"""The Triton kernels in Triton's interpreter, and as shipped without Triton, in processes of their own: triton chooses
when it loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_kernels_do_not_load_triton_unasked() -> None:
    code = (
        "import sys, hybridcomm.kernels, hybridcomm.kernels.host, hybridcomm.kernels.reference, "
        "hybridcomm.kernels.triton; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def run(name: str, **env: str) -> None:
    """The tests of a file, in a process of its own; none may be skipped."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)],
        env=os.environ | env,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout, result.stdout


@pytest.mark.timeout(400)
def test_what_is_shipped_needs_no_triton() -> None:
    pytest.importorskip("torch", reason="torch is not installed: nothing is launched")
    run("without_triton.py")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kernels", ["topk", "gtop1", "randk", "quant", "bucket"])
def test_triton_equals_the_oracle(kernels: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested here")
    pytest.importorskip("torch", reason="torch is not installed: the Triton kernels are not tested here")
    run(f"interpreted_{kernels}.py", TRITON_INTERPRET="1")
