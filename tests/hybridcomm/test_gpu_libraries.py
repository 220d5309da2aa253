"""Which files of NCCL are found in an environment, and in what order; with wheels made for the purpose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybridcomm.gpu_libraries import SONAME, WHEELS, NcclFile, nccl_files, torch_cuda
from tests.repository.layout import ROOT

INSIDE = f"nvidia/nccl/lib/{SONAME}"


def install(site: Path, package: str, version: str, *, there: bool = True, recorded: bool = True) -> Path:
    """A wheel's file and record in ``site``; the file's path."""
    path = site / INSIDE
    if there:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(package.encode())
    info = site / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    if recorded:
        (info / "RECORD").write_text(f"nvidia/nccl/include/nccl.h,,\n{INSIDE},,\n")
    return path


@pytest.fixture
def sites(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """An environment of two folders and no torch."""
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder) for folder in folders])
    for name in [name for name in sys.modules if name == "nvidia" or name.startswith("nvidia.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return folders


def torch_built_with(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(version=SimpleNamespace(cuda=version)))  # type: ignore[arg-type]


def test_nothing_is_found_where_there_is_nothing(sites: tuple[Path, Path]) -> None:
    assert nccl_files() == ()
    install(sites[0], "nvidia-nccl-cu11", "2.18.1", there=False)
    install(sites[1], "nvidia-nccl-cu12", "2.18.1", there=False)  # its record outlived its file
    assert nccl_files() == ()


@pytest.mark.parametrize("major", WHEELS)
def test_a_wheel_s_file_is_found_with_what_it_is(sites: tuple[Path, Path], major: int) -> None:
    path = install(sites[1], WHEELS[major], "2.27.7")
    assert nccl_files() == (NcclFile(path=path, package=WHEELS[major], version="2.27.7", cuda=major),)


@pytest.mark.parametrize(
    ("torch", "first"), [(None, 12), ("12.8", 12), ("13.0", 13), ("11.8", 12), ("cpu", 12)]
)
def test_two_wheels_are_listed_and_torch_says_which_goes_first(
    monkeypatch: pytest.MonkeyPatch, sites: tuple[Path, Path], torch: str | None, first: int
) -> None:
    paths = {13: install(sites[0], WHEELS[13], "2.30.7"), 12: install(sites[1], WHEELS[12], "2.27.3")}
    torch_built_with(monkeypatch, torch)
    found = nccl_files()
    assert [file.cuda for file in found] == [first, 25 - first]
    assert [file.path for file in found] == [paths[first], paths[25 - first]]


def test_two_wheels_in_one_folder_have_one_file(
    monkeypatch: pytest.MonkeyPatch, sites: tuple[Path, Path]
) -> None:
    for major in WHEELS:
        path = install(sites[0], WHEELS[major], "2.30.7")
    (file,) = nccl_files()
    assert (file.path, file.cuda) == (path, 12)
    torch_built_with(monkeypatch, "13.0")
    (file,) = nccl_files()
    assert (file.path, file.cuda) == (path, 13)


def test_of_one_kind_the_earlier_entry_of_the_path_goes_first(sites: tuple[Path, Path]) -> None:
    paths = [
        install(site, WHEELS[12], version) for site, version in zip(sites, ("2.18.1", "2.32.3"), strict=True)
    ]
    assert [file.path for file in nccl_files()] == paths
    sys.path.reverse()
    assert [file.path for file in nccl_files()] == paths[::-1]


def test_a_file_without_a_record_is_found_last(sites: tuple[Path, Path]) -> None:
    bare = install(sites[0], WHEELS[12], "2.18.1", recorded=False)
    assert nccl_files() == (NcclFile(path=bare),)
    known = install(sites[1], WHEELS[13], "2.30.7")
    assert [(file.path, file.cuda) for file in nccl_files()] == [(known, 13), (bare, None)]


def test_a_package_that_says_nothing_of_itself_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, sites: tuple[Path, Path]
) -> None:
    path = install(sites[0], WHEELS[12], "2.18.1")
    install(sites[1], WHEELS[13], "2.18.1", recorded=False)
    monkeypatch.setitem(sys.modules, "nvidia", SimpleNamespace(__spec__=None))  # type: ignore[arg-type]
    assert [file.path for file in nccl_files()] == [path]


def test_a_link_to_a_file_is_that_file(sites: tuple[Path, Path]) -> None:
    path = install(sites[0], WHEELS[12], "2.18.1")
    other = install(sites[1], WHEELS[13], "2.18.1", there=False)
    other.parent.mkdir(parents=True)
    other.symlink_to(path)
    assert [file.path for file in nccl_files()] == [path]


@pytest.mark.parametrize(("version", "major"), [("12.8", 12), ("13", 13), (None, None), ("", None)])
def test_torch_is_asked_only_if_it_is_there(
    monkeypatch: pytest.MonkeyPatch, version: str | None, major: int | None
) -> None:
    torch_built_with(monkeypatch, version)
    assert torch_cuda() == major
    monkeypatch.delitem(sys.modules, "torch")
    assert torch_cuda() is None


def test_nothing_is_imported_for_it(tmp_path: Path) -> None:
    """Also where ``nvidia`` is a package with code of its own, which would be run by an import."""
    install(tmp_path, WHEELS[12], "2.18.1")
    (tmp_path / "nvidia" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    code = (
        "import sys; from hybridcomm.gpu_libraries import nccl_files\n"
        "(file,) = nccl_files()\n"
        "print(file.cuda, [name for name in ('torch', 'nvidia', 'nvidia.nccl') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "12 []\n"
