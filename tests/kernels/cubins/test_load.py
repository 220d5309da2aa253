"""What a launcher gets: bytes, launch, parameter buffer, or an error that says what serves instead."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from hybridcomm.kernels.cubins import (
    AlignmentError,
    ArchitectureError,
    ArtefactError,
    KernelError,
    find,
    find_ptx,
    names,
)
from hybridcomm.kernels.cubins.manifest import pack
from tests.kernels.cubins.fakes import make_artefacts, make_sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_artefacts(tmp_path / "artefacts", make_sources(tmp_path / "kernels"))
    return tmp_path / "artefacts"


def test_a_cubin_with_its_launch(folder: Path) -> None:
    image = find("double", 90, folder)
    assert (image.data, image.arch, image.is_ptx, image.symbol) == (b"cubin 90", 90, False, "_double")
    assert (image.threads, image.dynamic_shared, image.static_shared) == (128, 128, 0)
    assert [image.grid(numel) for numel in (0, 1, 512, 513)] == [0, 1, 1, 2]
    assert names(folder) == ("double",)


@pytest.mark.parametrize(("arch", "served"), [(80, 80), (86, 80), (89, 80), (90, 90)])
def test_later_minor_capabilities_are_served(folder: Path, arch: int, served: int) -> None:
    assert find("double", arch, folder).arch == served


@pytest.mark.parametrize("arch", [75, 100, 120])
def test_an_architecture_without_a_cubin(folder: Path, arch: int) -> None:
    with pytest.raises(ArchitectureError, match=rf"sm_{arch}.*sm_80, sm_90.*Triton's JIT.*PTX"):
        find("double", arch, folder)


def test_ptx_is_the_oldest_unless_asked(folder: Path) -> None:
    assert find_ptx("double", folder=folder).data == b"ptx 80\0"
    assert find_ptx("double", 90, folder).data == b"ptx 90\0"
    with pytest.raises(ArchitectureError, match="no PTX for sm_100"):
        find_ptx("double", 100, folder)


def test_an_unknown_kernel(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"'triple'.*known: double"):
        find("triple", 80, folder)
    with pytest.raises(KernelError, match="known: none"):
        find("double", 80, tmp_path / "nowhere")


def test_a_damaged_artefact_is_not_loaded(folder: Path) -> None:
    (folder / "double.xz").write_bytes(pack(b"cubin 80cubin 91ptx 80ptx 90"))
    assert find("double", 80, folder).data == b"cubin 80"
    with pytest.raises(ArtefactError, match="damaged"):
        find("double", 90, folder)


def test_the_parameter_buffer(folder: Path) -> None:
    """As C lays a struct out: pointer, int, hole, long long, float, hole, null."""
    buffer = find("double", 80, folder).pack(grad=0x7F0000001000, count=-3, numel=1 << 40, weight=0.25)
    assert buffer == struct.pack("@PiqfP", 0x7F0000001000, -3, 1 << 40, 0.25, 0)
    assert len(buffer) == 40


def test_what_the_compiler_was_promised_is_checked(folder: Path) -> None:
    image, given = find("double", 80, folder), {"grad": 0x100, "count": 3, "numel": 48, "weight": 0.5}
    assert image.pack(**given)
    for name, value in (("grad", 0x104), ("numel", 40)):
        with pytest.raises(AlignmentError, match=rf"double: {name}={value:#x} is no multiple of 16"):
            image.pack(**{**given, name: value})


def test_arguments_must_be_the_kernels(folder: Path) -> None:
    image = find("double", 80, folder)
    with pytest.raises(TypeError, match="takes grad, count, numel, weight; got grad"):
        image.pack(grad=0)
    with pytest.raises(TypeError, match="takes grad"):
        image.pack(grad=0, count=0, numel=0, weight=0.0, global_scratch=1)
