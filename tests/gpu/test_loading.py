"""Which copy of a library is taken, what is refused, and what a table lacks; with libraries made for the purpose.

Real ones are large, so `make verify` fetches them: see `real_libraries.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.gpu.loading import Ran, build_loader, compile_cpp, run_loader
from tests.gpu.test_abi import cuda_calls, nccl_calls, number

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("gpu-loading"),  # one program serves all
]

NEWER = [call.symbol for call in nccl_calls() if call.since]


Load = Callable[..., Ran]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    return partial(run_loader, build_loader(tmp_path_factory.mktemp("loader")))


def look_alike(
    path: Path, *, symbols: Sequence[str], version: int = 0, version_symbol: str = "", extra: str = ""
) -> Path:
    """A library that has these symbols; the one that tells the version does, all others return 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    functions = [f"int {symbol}() {{ return 0; }}" for symbol in symbols if symbol != version_symbol]
    if version_symbol in symbols:
        functions.append(f"int {version_symbol}(int* version) {{ *version = {version}; return 0; }}")
    source = 'extern "C" {\n' + "\n".join([*functions, extra]) + "\n}\n"
    return compile_cpp(path, "-shared", "-fPIC", "-x", "c++", "-", source=source)


def nccl(path: Path, version: str = "2.27.3", *, without: Sequence[str] = ()) -> Path:
    there = [call.symbol for call in nccl_calls() if call.since <= number(version)]
    return look_alike(
        path,
        symbols=[symbol for symbol in there if symbol not in without],
        version=number(version),
        version_symbol="ncclGetVersion",
    )


def cuda(path: Path, version: int = 12040, *, without: Sequence[str] = (), init: int = 0) -> Path:
    own = ("cuGetErrorName", "cuGetErrorString", "cuInit", "cuDeviceGetCount")
    extra = f"""
        int cuGetErrorName(int, const char** word) {{ *word = "CUDA_ERROR_MADE_UP"; return 0; }}
        int cuGetErrorString(int, const char** text) {{ *text = "made up"; return 0; }}
        int cuInit(unsigned) {{ return {init}; }}
        int cuDeviceGetCount(int* count) {{ *count = 2; return 0; }}
    """
    return look_alike(
        path,
        symbols=[call.symbol for call in cuda_calls() if call.symbol not in (*without, *own)],
        version=version,
        version_symbol="cuDriverGetVersion",
        extra=extra,
    )


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("copies")
    return {name: nccl(folder / name / "libnccl.so.2") for name in ("one", "two", "system")}


def test_the_users_path_goes_before_all(load: Load, copies: dict[str, Path]) -> None:
    got = load("nccl", "--file", copies["two"], HYBRIDCOMM_NCCL=copies["one"])
    assert (got.said["path"], got.said["how"]) == (str(copies["one"]), "HYBRIDCOMM_NCCL")


def test_a_mapped_copy_goes_before_files(load: Load, copies: dict[str, Path]) -> None:
    got = load("nccl", "--map", copies["one"], "--file", copies["two"])
    assert (got.said["path"], got.said["how"]) == (str(copies["one"]), "mapped already")


def test_a_file_goes_before_the_system(load: Load, copies: dict[str, Path], tmp_path: Path) -> None:
    system = {"LD_LIBRARY_PATH": copies["system"].parent}
    got = load("nccl", "--file", tmp_path / "gone.so", "--file", copies["two"], **system)
    assert (got.said["path"], got.said["how"]) == (str(copies["two"]), "file")
    got = load("nccl", "--file", tmp_path / "gone.so", **system)
    assert (got.said["path"], got.said["how"]) == (str(copies["system"]), "system")


def test_two_mapped_copies_are_refused_with_both_named(load: Load, copies: dict[str, Path]) -> None:
    got = load("nccl", "--map", copies["one"], "--map", copies["two"])
    assert got.code == 1
    assert str(copies["one"]) in got.said["error"]
    assert str(copies["two"]) in got.said["error"]


def test_the_users_path_beside_a_mapped_copy_is_refused(load: Load, copies: dict[str, Path]) -> None:
    got = load("nccl", "--map", copies["one"], HYBRIDCOMM_NCCL=copies["two"])
    assert got.code == 1
    assert str(copies["one"]) in got.said["error"]
    assert str(copies["two"]) in got.said["error"]
    assert "unset HYBRIDCOMM_NCCL" in got.said["error"]


def test_one_copy_under_two_names_is_one(load: Load, copies: dict[str, Path], tmp_path: Path) -> None:
    link = tmp_path / "libnccl.so.2"
    link.symlink_to(copies["one"])
    got = load("nccl", "--map", copies["one"], HYBRIDCOMM_NCCL=link)
    assert got.code == 0, got
    assert got.said["how"] == "HYBRIDCOMM_NCCL"


def test_what_was_tried_is_said_when_there_is_none(load: Load, tmp_path: Path) -> None:
    broken = tmp_path / "libnccl.so.2"
    broken.write_bytes(b"no library")
    got = load("nccl", "--file", broken, "--soname", "libnccl-that-nobody-has.so.2")
    assert got.code == 1
    for word in ("NCCL is not there", str(broken), "libnccl-that-nobody-has.so.2", "install it"):
        assert word in got.said["error"]
    got = load("nccl", HYBRIDCOMM_NCCL=tmp_path / "gone.so")
    assert "HYBRIDCOMM_NCCL=" in got.said["error"]


@pytest.mark.parametrize("version", ["2.18.1", "2.19.3", "2.23.4", "2.27.3", "2.30.7"])
def test_newer_calls_are_there_from_their_version_on(load: Load, tmp_path: Path, version: str) -> None:
    got = load("nccl", HYBRIDCOMM_NCCL=nccl(tmp_path / "libnccl.so.2", version))
    assert got.said["version"] == str(number(version))
    assert got.said["newer"].split() == [c.symbol for c in nccl_calls() if 0 < c.since <= number(version)]


def test_a_newer_call_that_is_exported_too_early_is_not_used(load: Load, tmp_path: Path) -> None:
    every = [call.symbol for call in nccl_calls()]
    made = look_alike(
        tmp_path / "libnccl.so.2", symbols=every, version=21805, version_symbol="ncclGetVersion"
    )
    assert load("nccl", HYBRIDCOMM_NCCL=made).said["newer"] == ""


def test_a_newer_call_that_is_missing_is_done_without(load: Load, tmp_path: Path) -> None:
    made = nccl(tmp_path / "libnccl.so.2", "2.30.7", without=["ncclCommShrink"])
    assert load("nccl", HYBRIDCOMM_NCCL=made).said["newer"].split() == [
        s for s in NEWER if s != "ncclCommShrink"
    ]


def test_an_old_or_maimed_nccl_is_refused(load: Load, tmp_path: Path) -> None:
    older = [call.symbol for call in nccl_calls() if not call.since]
    old = look_alike(tmp_path / "libnccl.so.2", symbols=older, version=21701, version_symbol="ncclGetVersion")
    assert "is NCCL 2.17.1: 2.18.1 or later is needed" in load("nccl", HYBRIDCOMM_NCCL=old).said["error"]
    maimed = nccl(tmp_path / "b" / "libnccl.so.2", without=["ncclCommSplit", "ncclSend"])
    assert "without ncclCommSplit, ncclSend" in load("nccl", HYBRIDCOMM_NCCL=maimed).said["error"]


def test_a_driver_is_taken_from_cuda_12_on(load: Load, tmp_path: Path) -> None:
    got = load("cuda", HYBRIDCOMM_CUDA=cuda(tmp_path / "libcuda.so.1"))
    assert (got.said["version"], got.said["devices"]) == ("12040", "2")
    old = load("cuda", HYBRIDCOMM_CUDA=cuda(tmp_path / "old" / "libcuda.so.1", 11080))
    assert "CUDA 11" in old.said["error"]
    maimed = load("cuda", HYBRIDCOMM_CUDA=cuda(tmp_path / "b" / "libcuda.so.1", without=["cuMemAlloc_v2"]))
    assert "has no cuMemAlloc_v2" in maimed.said["error"]


def test_no_device_is_no_error_and_others_are(load: Load, tmp_path: Path) -> None:
    got = load("cuda", HYBRIDCOMM_CUDA=cuda(tmp_path / "libcuda.so.1", init=100))
    assert (got.code, got.said["devices"]) == (0, "0")
    assert got.said["cuInit:"].startswith("CUDA_ERROR_MADE_UP (100), made up: see nvidia-smi")
    there = load("cuda", HYBRIDCOMM_CUDA=cuda(tmp_path / "there" / "libcuda.so.1"))
    assert (there.said["devices"], there.said["cuInit:"]) == ("2", "well")
    got = load("cuda", HYBRIDCOMM_CUDA=cuda(tmp_path / "b" / "libcuda.so.1", init=802))
    assert got.said["error"].startswith("cuInit: CUDA_ERROR_MADE_UP (802), made up: look for")
