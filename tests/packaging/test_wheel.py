"""The wheel that a user gets: built from the sdist, one import name, no CUDA, torch or MPI behind it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest

from tests.gpu.real_libraries import WHEELS
from tests.repository.layout import ROOT

# One build serves all tests of this file, so they stay on one worker; and it takes a while on a busy machine.
pytestmark = [pytest.mark.xdist_group("packaging"), pytest.mark.timeout(600)]

FOREIGN = ("cuda", "nccl", "cublas", "torch", "c10", "mpi", "triton")


@dataclass(frozen=True, kw_only=True)
class Built:
    sdist: Path
    wheel: Path
    seconds: float


def run(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CMAKE_ARGS")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """sdist from the sources, wheel from the unpacked sdist, in an environment that hides CUDA and MPI."""
    out = tmp_path_factory.mktemp("dist")
    env = {**clean_environment(), "CUDA_HOME": "/nonexistent", "CUDA_PATH": "/nonexistent"}
    code = "import scikit_build_core.build as b, sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    made = run(sys.executable, "-c", code, "build_sdist", out, cwd=ROOT, env=env)
    assert made.returncode == 0, made.stderr
    sdist = out / made.stdout.split()[-1]
    with tarfile.open(sdist) as archive:
        archive.extractall(out, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    source = out / sdist.name.removesuffix(".tar.gz")
    begin = time.monotonic()
    made = run(sys.executable, "-c", code, "build_wheel", out, cwd=source, env=env)
    seconds = time.monotonic() - begin
    assert made.returncode == 0, made.stdout + made.stderr
    print(f"\nwheel built from sdist in {seconds:.0f} s (the target is 60 s on 2 idle cores)")
    return Built(sdist=sdist, wheel=out / made.stdout.split()[-1], seconds=seconds)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel and, borrowed, this one's numpy; no torch."""
    folder = tmp_path_factory.mktemp("plain")
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python3*/site-packages"))
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(site)  # all that installing a wheel without scripts does
    libraries = Path(np.__file__).parents[1]
    for entry in libraries.glob("numpy*"):
        (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def names(built: Built) -> list[str]:
    with zipfile.ZipFile(built.wheel) as archive:
        return archive.namelist()


def test_one_import_name(built: Built) -> None:
    tops = {name.partition("/")[0] for name in names(built)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hybridcomm"}


def test_the_wheel_holds_what_it_should(built: Built) -> None:
    held = names(built)
    for stem in ("hybridcomm/_C.", "hybridcomm/kernels/_host."):
        assert [name for name in held if name.startswith(stem) and name.endswith(".so")]
    for name in ("hybridcomm/py.typed", "hybridcomm/_C.pyi", "hybridcomm/kernels/_host.pyi"):
        assert name in held
    sources = {
        prefix + path.relative_to(ROOT / folder).as_posix()
        for folder, prefix in (("hybridcomm", "hybridcomm/"), ("kernels", "hybridcomm/kernels/"))
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sources <= set(held)
    assert any(name.endswith("licenses/LICENSE") for name in held)


def requirements(built: Built) -> dict[str, list[str]]:
    """Names and bounds that the wheel's metadata asks for, by extra; "": always."""
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    found: dict[str, list[str]] = {extra: [] for extra in metadata.get_all("Provides-Extra", [])}
    for line in metadata.get_all("Requires-Dist", []):
        what, _, marker = line.partition(";")
        extra = re.fullmatch(r"\s*extra == ['\"](.+)['\"]", marker)
        found.setdefault(extra[1] if extra else marker.strip(), []).append(what.replace(" ", ""))
    return found


def test_cuda_comes_with_extras_alone(built: Built) -> None:
    asked = requirements(built)
    assert asked.pop("") == ["numpy>=1.26"]
    assert asked.pop("cuda12") == ["nvidia-nccl-cu12>=2.18.1", "cupy-cuda12x>=13.2"]
    assert asked.pop("cuda13") == ["nvidia-nccl-cu13>=2.27.7", "cupy-cuda13x>=13.6"]
    assert {"torch", "train", "test"} <= set(asked)
    others = [what for of_extra in asked.values() for what in of_extra]
    assert [what for what in others if any(word in what for word in ("nccl", "cupy", "nvidia"))] == []


def test_the_lower_bounds_of_nccl_are_the_engine_s_and_were_loaded(built: Built) -> None:
    """`make verify` loads the wheels that `real_libraries.WHEELS` lists."""
    asked = requirements(built)
    bounds = dict(
        what.split(">=") for extra in ("cuda12", "cuda13") for what in asked[extra] if "nccl" in what
    )
    source = (ROOT / "hybridcomm" / "csrc" / "gpu_nccl_abi.h").read_text()
    oldest = re.search(r"kOldestNccl = nccl_version\((\d+), (\d+), (\d+)\)", source)
    assert oldest is not None
    assert bounds["nvidia-nccl-cu12"] == ".".join(oldest.groups())
    assert {package: versions[0] for package, versions in WHEELS.items()} == bounds


def test_sdist_and_wheel_hold_the_cubins(built: Built, installed: Path, tmp_path: Path) -> None:
    """Byte for byte, and they load without triton; what they were built with was not needed to build the wheel."""
    folder = ROOT / "kernels" / "cubins" / "artefacts"
    artefacts = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "manifest.json" in artefacts
    with zipfile.ZipFile(built.wheel) as archive:
        for name, content in artefacts.items():
            assert archive.read(f"hybridcomm/kernels/cubins/artefacts/{name}") == content
    with tarfile.open(built.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"kernels/cubins/artefacts/{name}" for name in artefacts} <= held
    code = (
        "import sys; from hybridcomm.kernels import cubins\n"
        "for name in cubins.names():\n"
        "    assert cubins.find(name, 90).data[:4] == b'\\x7fELF'\n"
        "assert 'triton' not in sys.modules\n"
        "print(len(cubins.names()))"
    )
    result = run(installed, "-c", code, cwd=tmp_path, env=clean_environment())
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(artefacts) - 1


def test_the_wheel_holds_nothing_else(built: Built) -> None:
    allowed = (".py", ".pyi", ".so", "py.typed", "hybridcomm/kernels/cubins/executed.json")
    artefacts = "hybridcomm/kernels/cubins/artefacts/"
    strange = [
        n
        for n in names(built)
        if ".dist-info/" not in n and not n.endswith(allowed) and not n.startswith(artefacts)
    ]
    assert strange == []


def test_the_sdist_holds_the_sources(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("CMakeLists.txt", "LICENSE", "kernels/host/codec.h", "hybridcomm/csrc/engine.cpp"):
        assert name in held
    assert not [
        name for name in held if name.endswith((".so", ".pyc")) or name.startswith((".venv", "build/"))
    ]


def test_extensions_need_no_cuda_torch_or_mpi(built: Built, tmp_path: Path) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(tmp_path)
    extensions = sorted(tmp_path.rglob("*.so"))
    assert len(extensions) == 2
    for extension in extensions:
        linked = run("ldd", extension, cwd=tmp_path)
        assert linked.returncode == 0, linked.stderr
        libraries = [line.split()[0] for line in linked.stdout.splitlines()]
        assert any(library.startswith("libstdc++") for library in libraries)
        assert not [lib for lib in libraries if any(word in lib.lower() for word in FOREIGN)]


def test_it_works_without_torch(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, hybridcomm, hybridcomm.kernels.spec\n"
        "hybridcomm.init()\n"
        "a = np.arange(5, dtype=np.float32)\n"
        "hybridcomm.allreduce(a)\n"
        "assert a.tolist() == [0, 1, 2, 3, 4] and 'torch' not in sys.modules\n"
        "print(hybridcomm.__version__)"
    )
    result = run(installed, "-c", code, cwd=tmp_path, env=clean_environment())
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_a_plain_install_in_a_checkout_says_what_to_do(installed: Path) -> None:
    result = run(installed, "-c", "import hybridcomm", cwd=ROOT, env=clean_environment())
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert "make install" in last
    assert "another directory" in last


def test_the_stub_of_the_engine_is_true() -> None:
    """Every name of ``_C.pyi`` is there, and every public name of the module is in the stub."""
    import ast

    from hybridcomm import _C

    tree = ast.parse((ROOT / "hybridcomm" / "_C.pyi").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    values = {
        n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    assert {name for name in vars(_C) if not name.startswith("_")} == {*classes, *functions, *values}
    for name, node in classes.items():
        told = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
        told |= {
            n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        }
        real = {entry for entry in vars(getattr(_C, name)) if not entry.startswith("_")}
        assert {entry for entry in told if not entry.startswith("_")} == real, name
