"""The Triton kernels of the dense codecs and of buckets in Triton's interpreter, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(400)
@pytest.mark.parametrize("what", ["quant", "bucket"])
def test_triton_equals_the_oracle(what: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested here")
    pytest.importorskip("torch", reason="torch is not installed: the Triton kernels are not tested here")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(HERE / f"interpreted_{what}.py"),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
