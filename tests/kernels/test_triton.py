"""The Triton kernels in Triton's interpreter, in a process of their own: triton chooses when it loads."""

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


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kernels", ["topk", "gtop1", "randk", "quant", "bucket"])
def test_triton_equals_the_oracle(kernels: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested here")
    pytest.importorskip("torch", reason="torch is not installed: the Triton kernels are not tested here")
    root = HERE.parents[1]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(HERE / f"interpreted_{kernels}.py"),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
