"""Engine and kernels under sanitizers: as C++ programs without Python, and the module itself under pytest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import native
from tests.native import ROOT
from tests.repository.layout import make_layout

needs_time = pytest.mark.skipif(
    not os.environ.get("HYBRIDCOMM_SANITIZERS"),
    reason="sanitizer builds take a minute each: set HYBRIDCOMM_SANITIZERS=1 (make verify does)",
)


@needs_time
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_engine_and_kernels_are_clean(tmp_path: Path, kind: str) -> None:
    native.configure(tmp_path, sanitize=kind)
    native.build(tmp_path, "hybridcomm_engine_test", "hybridcomm_kernels_test")
    for name in ("engine", "kernels"):
        code, printed = native.run_program(tmp_path / f"hybridcomm_{name}_test", limit=400)
        assert code == 0, printed
        assert re.search(r"\b0 failures", printed)


def library(name: str) -> str:
    """The path of a compiler's run-time library."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def sanitized_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on the package with the modules of a sanitized build, which shadow the installed ones."""
    # libstdc++ goes along: the sanitizer looks for its functions when it starts.
    preload = f"{library('libasan.so')} {library('libstdc++.so.6')}"
    # Python itself frees little at its end, and torch maps gigabytes.
    options = "detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=32:exitcode=99"
    start = (
        "import sys, pytest\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from hybridcomm import _C\n"
        "assert _C.__file__.startswith(sys.argv[1]), _C.__file__\n"
        "sys.exit(pytest.main(sys.argv[2:]))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", start, str(folder), "-p", "no:cacheprovider", "-p", "no:xdist", *arguments],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": options, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1100,
    )


@needs_time
@pytest.mark.timeout(1800)
def test_the_python_module_is_clean(tmp_path: Path) -> None:
    build, layout = tmp_path / "build", make_layout(tmp_path / "layout")
    native.configure(build, sanitize="address,undefined")
    native.build(build, "_C", "_host")
    package = layout / "hybridcomm"
    kernels = package / "kernels"
    sources = kernels.resolve()
    kernels.unlink()  # a folder of links instead of a link, so that the module can lie in it
    kernels.mkdir()
    for entry in sources.iterdir():
        if entry.name not in ("host", "__pycache__"):
            (kernels / entry.name).symlink_to(entry)
    (kernels / "host").symlink_to(sources / "host")
    for name, where in (("_C", package), ("_host", kernels)):
        for module in build.glob(f"{name}.*.so"):
            (where / module.name).symlink_to(module)
    done = sanitized_pytest(
        layout, "-q", "tests/hybridcomm/test_engine_dense.py", "tests/kernels/test_topk_host.py"
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout.splitlines()[-1]
