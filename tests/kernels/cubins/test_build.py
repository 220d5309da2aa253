"""Building ahead of time, for real: what comes out loads, is the same every time, and is as old as a driver needs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybridcomm.kernels.cubins import BuildError, elf, find, find_ptx, lock, ptx
from hybridcomm.kernels.cubins.manifest import Manifest

pytest.importorskip("triton", reason="triton is not installed: no kernel can be built here")

from hybridcomm.kernels.cubins import build as building
from hybridcomm.kernels.cubins import registry, tools, triton_source
from tests.kernels.cubins import planted

pytestmark = pytest.mark.timeout(600)  # compiling takes a while on a busy machine

# A kernel of the tests in the place of a shipped one: its source file is the package's, its function is not.
KERNEL = replace(planted.SOUND, source="triton/jit/__init__.py")
MODULE = "triton.__init__"


@pytest.fixture
def planted_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "gather", lambda: {MODULE: (KERNEL,)})
    monkeypatch.setattr(triton_source, "function", lambda kernel: planted.sound)


def build(folder: Path, **options: Any) -> list[str]:
    said: list[str] = []
    building.build(folder, say=said.append, jobs=1, **options)
    return said


@pytest.mark.usefixtures("planted_registry")
def test_builds_are_reproducible_and_incremental(tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert build(first)[0] == "1 kernels to build, 0 are up to date"
    build(again, force=True)
    for name in ("sound.xz", "manifest.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    assert build(first) == ["0 kernels to build, 1 are up to date"]
    assert (first / "manifest.json").read_bytes() == (again / "manifest.json").read_bytes()
    (first / "sound.xz").write_bytes(b"damaged")
    (first / "gone.xz").write_bytes(b"")
    assert build(first)[0] == "1 kernels to build, 0 are up to date"
    assert sorted(path.name for path in first.iterdir()) == ["manifest.json", "sound.xz"]

    (entry,) = Manifest.read(first).entries
    assert [(p.name, p.offset, p.hidden) for p in entry.parameters] == [
        ("x", 0, False),
        ("y", 8, False),
        ("n", 16, False),
        ("global_scratch", 24, True),
        ("profile_scratch", 32, True),
    ]
    assert lock.intact(entry, first) == []
    for arch in KERNEL.archs:
        told = elf.read(find("sound", arch, first).data)
        assert (told.symbol, told.threads) == ("sound", 128)
        assert told.parameters == tuple((p.offset, p.nbytes) for p in entry.parameters)


@pytest.mark.usefixtures("planted_registry")
def test_ptx_is_old_enough_for_every_driver_of_cuda_12(tmp_path: Path) -> None:
    build(tmp_path)
    portable = ptx.read(find_ptx("sound", folder=tmp_path).data[:-1].decode())
    assert (portable.version, portable.target) == ("8.0", "sm_80")
    for arch in KERNEL.archs:
        text = find_ptx("sound", arch, tmp_path).data[:-1].decode()
        told = ptx.read(text)
        assert (told.version, told.target) == (ptx.ISA[arch], f"sm_{arch}")
        assert "//" not in text
        assert ".loc" not in text, "paths of the machine that built it"
    assert tools.ptxas_version().startswith("12.")


def test_ptxas_refuses_what_is_newer_than_told() -> None:
    """The proof that lowering a version or a target is harmless: what needs more does not assemble."""
    begin = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{\n"
    with pytest.raises(BuildError, match=r"(?s)ptxas.*target sm_90"):
        tools.assemble(begin + "barrier.cluster.arrive;\nret;\n}\n", 80)
    body = ".reg .b64 %rd<2>;\n.reg .b32 %r<2>;\nmultimem.red.release.sys.global.add.u32 [%rd1], %r1;\n"
    with pytest.raises(BuildError, match=r"(?s)ptxas.*PTX ISA \.version 8\.1"):
        tools.assemble(begin + body + "ret;\n}\n", 80)
    assert elf.read(tools.assemble(begin + "ret;\n}\n", 80)).symbol == "k"


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (replace(KERNEL, arguments=KERNEL.arguments[:2]), "the arguments of sound are x, y, n, BLOCK"),
        (replace(KERNEL, arguments=tuple(reversed(KERNEL.arguments))), "the arguments of sound are"),
    ],
)
def test_arguments_must_be_the_functions(kernel: Any, said: str) -> None:
    with pytest.raises(BuildError, match=re.escape(said)):
        building.compile_kernel(kernel, 80, planted.sound)


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BuildError, match="TRITON_INTERPRET"):
        building.compile_kernel(KERNEL, 80, planted.sound)


def test_a_function_that_is_not_there() -> None:
    with pytest.raises(BuildError, match=r"triton/jit/__init__\.py has no Triton function sound"):
        building.compile_kernel(KERNEL, 80)
