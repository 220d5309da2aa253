"""What `real_libraries.py` finds in libraries made for the purpose, and that it counts what is not to be had."""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.gpu import real_libraries
from tests.gpu.loading import build_loader
from tests.gpu.real_libraries import WHEELS, Finding, UnavailableError, check_driver, check_nccl, version_of
from tests.gpu.test_abi import nccl_calls, number
from tests.gpu.test_loading import cuda, look_alike

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("gpu-loading"),
]
WORDS = ("ncclGetErrorString", "ncclGetLastError", "ncclCommInitRankConfig")
WITHOUT_DEVICE = """
    const char* ncclGetErrorString(int) { return "unhandled cuda error"; }
    const char* ncclGetLastError(void*) { return "Cuda failure 'made up'"; }
    int ncclCommInitRankConfig() { return 1; }
"""


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_loader(tmp_path_factory.mktemp("loader"))


def nccl(
    path: Path, version: str, *, says: str = "", more: Sequence[str] = (), without: Sequence[str] = ()
) -> Path:
    """As it is without a device; ``says``: the version that it says instead."""
    own = [call.symbol for call in nccl_calls() if call.since <= number(version)]
    return look_alike(
        path,
        symbols=[symbol for symbol in (*own, *more) if symbol not in (*WORDS, *without)],
        version=number(says or version),
        version_symbol="ncclGetVersion",
        extra=WITHOUT_DEVICE,
    )


@pytest.mark.parametrize("version", ["2.18.1", "2.27.3", "2.30.7"])
def test_what_is_as_it_should_be_has_no_problem(loader: Path, tmp_path: Path, version: str) -> None:
    found = check_nccl(loader, nccl(tmp_path / "libnccl.so.2", version), "nccl", version, None)
    assert (found.problems, found.outcome) == ((), "as it should be")
    assert found.says == "1 unhandled cuda error: Cuda failure 'made up'"


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        ({"says": "2.27.5"}, "says 22705"),
        ({"without": ["ncclCommShrink"]}, "has no ncclCommShrink"),
        ({"without": ["ncclSend"]}, "fails: .*without ncclSend"),
        ({"more": ["ncclCommRevoke"]}, "has ncclCommRevoke before the version of our table"),
        ({"says": "2.26.2"}, "the loader has other newer calls"),
    ],
)
def test_what_is_not_is_found(loader: Path, tmp_path: Path, made: dict[str, list[str]], problem: str) -> None:
    found = check_nccl(loader, nccl(tmp_path / "libnccl.so.2", "2.27.3", **made), "nccl", "2.27.3", None)
    with pytest.raises(AssertionError, match=problem):
        assert not found.problems, found.outcome


def test_a_start_that_does_not_fail_is_found(loader: Path, tmp_path: Path) -> None:
    symbols = [call.symbol for call in nccl_calls() if not call.since]
    well = look_alike(
        tmp_path / "libnccl.so.2", symbols=symbols, version=21801, version_symbol="ncclGetVersion"
    )
    (problem,) = check_nccl(loader, well, "nccl", "2.18.1", None).problems
    assert problem.startswith("started, it says '0 ")


def test_a_crash_is_found(loader: Path, tmp_path: Path) -> None:
    path = tmp_path / "libnccl.so.2"
    symbols = [call.symbol for call in nccl_calls() if not call.since and call.symbol != "ncclGetUniqueId"]
    crash = "int ncclGetUniqueId() { __builtin_trap(); return 0; }"
    look_alike(path, symbols=symbols, version=21801, version_symbol="ncclGetVersion", extra=crash)
    found = check_nccl(loader, path, "nccl", "2.18.1", None)
    assert found.problems[0].startswith("fails: the loader ended with -4")


def test_drivers_are_told_apart(loader: Path, tmp_path: Path) -> None:
    none = cuda(tmp_path / "a" / "libcuda.so.1", 12020, init=100)
    (said,) = check_driver(loader, none, "libcuda1", 12020).problems
    assert said.startswith("cuInit says 'CUDA_ERROR_MADE_UP (100), made up")
    problems = check_driver(loader, cuda(tmp_path / "b" / "libcuda.so.1"), "libcuda1", 12020).problems
    assert problems == ("says 12040", "cuInit says 'well'", "counts devices")
    maimed = cuda(tmp_path / "c" / "libcuda.so.1", without=["cuMemAlloc_v2"])
    assert "has no cuMemAlloc_v2" in check_driver(loader, maimed, "libcuda1", 12040).outcome


def test_each_newer_call_is_looked_for_in_a_wheel_that_came_with_it() -> None:
    minors = {version.rpartition(".")[0] for version in WHEELS["nvidia-nccl-cu12"] if version}
    since = {f"{call.since // 10000}.{call.since // 100 % 100}" for call in nccl_calls() if call.since}
    assert since
    assert since <= minors
    assert "2.18" in minors
    assert all(versions[-1] == "" for versions in WHEELS.values())
    assert (version_of("2.26.2.post1"), version_of("none")) == (22602, 0)


def offline(monkeypatch: pytest.MonkeyPatch, links: Path) -> None:
    """pip sees ``links`` alone, apt-get nothing."""

    def nothing(_: Path) -> tuple[str, ...]:
        raise UnavailableError("no apt-get")

    monkeypatch.setattr(real_libraries, "non_free", nothing)
    monkeypatch.setattr(real_libraries, "GPU_DRIVER", links / "none")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))


def wheel(folder: Path, library: Path, version: str) -> None:
    info = f"nvidia_nccl_cu12-{version}.dist-info"
    with zipfile.ZipFile(folder / f"nvidia_nccl_cu12-{version}-py3-none-any.whl", "w") as archive:
        archive.write(library, "nvidia/nccl/lib/libnccl.so.2")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: nvidia-nccl-cu12\nVersion: {version}\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize(
    ("says", "outcome", "code"), [("", "1 passed, 0 failed", 0), ("2.27.5", "0 passed, 1 failed", 1)]
)
def test_wheels_are_fetched_and_what_is_not_there_is_counted(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    says: str,
    outcome: str,
    code: int,
) -> None:
    wheel(tmp_path, nccl(tmp_path / "libnccl.so.2", "2.27.3", says=says), "2.27.3")
    offline(monkeypatch, tmp_path)
    monkeypatch.setattr(
        real_libraries, "WHEELS", {"nvidia-nccl-cu12": ("2.18.1", ""), "nvidia-nccl-cu13": ("",)}
    )
    monkeypatch.setattr(sys, "argv", ["real_libraries", "--markdown", str(tmp_path / "found.md")])
    assert real_libraries.main() == code
    said, page = capsys.readouterr().out, (tmp_path / "found.md").read_text()
    assert said.splitlines()[-1] == f"{outcome}, 5 skipped"
    assert "| nvidia-nccl-cu12 |  2.18.1 |" in page
    for words in ("skipped: no apt-get", "skipped: pip cannot fetch it"):
        assert words in page
    assert Finding(library="a", skipped="why").outcome == "skipped: why"


@pytest.mark.parametrize(
    ("address", "array", "problem"),
    [
        ("address", "__dlpack__ = None", ""),
        ("address + 1", "__dlpack__ = None", "is taken for '32513'"),
        ("address", "pass", "no __dlpack__"),
        ("1 // 0", "pass", "fails: ['ZeroDivisionError"),
    ],
)
def test_streams_and_arrays_of_cupy_are_looked_at(
    tmp_path: Path, address: str, array: str, problem: str
) -> None:
    (tmp_path / "cupy.py").write_text(
        f"""
__version__ = "14.2.0"

class ndarray:
    {array}

class cuda:
    class ExternalStream:
        def __init__(self, address):
            self.ptr = {address}
"""
    )
    found = real_libraries.check_cupy("cupy-cuda12x", tmp_path)
    assert problem in found.outcome
    assert bool(found.problems) == bool(problem)


def test_a_machine_with_a_gpu_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(real_libraries, "GPU_DRIVER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["real_libraries"])
    assert real_libraries.main() == 0
    assert capsys.readouterr().out == "0 passed, 0 failed, 1 skipped\n"


def test_nodes_that_a_driver_makes_go_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(real_libraries, "DEVICES", tmp_path)
    (tmp_path / "nvidia0").touch()
    with real_libraries.no_new_devices():
        (tmp_path / "nvidiactl").touch()
        (tmp_path / "null").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"nvidia0", "null"}
