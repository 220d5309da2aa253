"""The lock between sources and artefacts: without triton, and every kind of change is found."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridcomm.kernels.cubins import BuildError, lock, registry, sources
from hybridcomm.kernels.cubins.manifest import Manifest
from tests.kernels.cubins.fakes import KERNEL, TOOLCHAIN, make_artefacts, make_sources


@pytest.fixture
def tree(tmp_path: Path) -> tuple[Path, Path]:
    root = make_sources(tmp_path / "kernels")
    make_artefacts(tmp_path / "artefacts", root)
    return root, tmp_path / "artefacts"


def test_what_was_built_is_not_stale(tree: tuple[Path, Path]) -> None:
    assert lock.check(*tree) == []


@pytest.mark.parametrize("name", ["payload.py", "triton/jit/bits.py", "triton/jit/double.py"])
def test_one_byte_of_a_source_is_seen(tree: tuple[Path, Path], name: str) -> None:
    (tree[0] / name).write_text((tree[0] / name).read_text() + " ")
    (problem,) = lock.check(*tree)
    assert f"double: {name} changed" in problem
    assert "`make cubins`" in problem


@pytest.mark.parametrize("name", ["triton/jit/other.py", "triton/launch.py", "triton/double.py"])
def test_what_it_is_not_built_from_changes_nothing(tree: tuple[Path, Path], name: str) -> None:
    """Device code of others; host code, and the module that declares it, whose settings are compared as such."""
    (tree[0] / name).write_text((tree[0] / name).read_text() + "x = 1\n")
    assert lock.check(*tree) == []


BUILT = {
    "name": "other",
    "source": "triton/jit/other.py",
    "function": "_other",
    "arguments": KERNEL.arguments[1:],
    "constants": (("BLOCK", 1024),),
    "num_warps": 8,
    "elements": 1024,
    "archs": (80,),
    "touched": ("grad",),
}
SAID = {
    "budget": dataclasses.replace(KERNEL.budget, instructions=1),
    "codec": "int4",
    "tail": True,
    "trips": 3,
}


def test_hashes_take_what_a_build_depends_on_and_no_more(tree: tuple[Path, Path]) -> None:
    """Every field of a kernel is one or the other."""
    assert {*BUILT, *SAID} == {field.name for field in dataclasses.fields(KERNEL)}
    files = sources.hashes(KERNEL.source, tree[0])
    right = lock.source_hash(KERNEL, TOOLCHAIN, files)
    for changes, same in ((BUILT, False), (SAID, True)):
        for name, value in changes.items():
            other = dataclasses.replace(KERNEL, **{name: value})
            assert (lock.source_hash(other, TOOLCHAIN, files) == right) is same, name


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def rename(folder: Path) -> None:
    (folder / "double.xz").rename(folder / "twice.xz")


def edit(folder: Path) -> None:
    """Another launch, by hand."""
    manifest = Manifest.read(folder)
    kernel = dataclasses.replace(KERNEL, num_warps=8)
    entries = (dataclasses.replace(manifest.entries[0], kernel=kernel),)
    dataclasses.replace(manifest, entries=entries).write(folder)


def forget(folder: Path) -> None:
    manifest = Manifest.read(folder)
    (folder / "double.xz").unlink()
    dataclasses.replace(manifest, entries=()).write(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: flip(folder / "double.xz"), "double"),
        (lambda folder: (folder / "double.xz").unlink(), "double.xz: No such file"),
        (rename, "twice.xz: an artefact that the manifest does not know"),
        (edit, "changed by hand"),
        (forget, "triton.double: its KERNELS were never built"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 0}'), "format 0"),
    ],
)
def test_changes_of_artefacts_are_seen(
    tree: tuple[Path, Path], change: Callable[[Path], object], said: str
) -> None:
    change(tree[1])
    problems = lock.check(*tree)
    assert any(said in problem for problem in problems), problems
    assert all("`make cubins`" in problem for problem in problems)


def test_every_byte_of_an_artefact_counts(tree: tuple[Path, Path]) -> None:
    """Whatever byte of the compressed file changes, the images do, or it does not unpack."""
    (entry,) = Manifest.read(tree[1]).entries
    path = tree[1] / "double.xz"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        assert lock.intact(entry, tree[1]), f"byte {at} of {len(whole)}"


def test_declarations_are_compared(tree: tuple[Path, Path]) -> None:
    other = dataclasses.replace(KERNEL, constants=(("BLOCK", 1024),))
    assert lock.check_kernels({"triton.double": (KERNEL,)}, tree[1]) == []
    assert (
        "double: built as it is not declared" in lock.check_kernels({"triton.double": (other,)}, tree[1])[0]
    )
    assert len(lock.check_kernels({}, tree[1])) == 1


def test_manifests_are_stable(tree: tuple[Path, Path]) -> None:
    text = (tree[1] / "manifest.json").read_text()
    manifest = Manifest.read(tree[1])
    assert manifest.text() == text
    reordered = dataclasses.replace(manifest, toolchain=dict(reversed(manifest.toolchain.items())))
    assert reordered.text() == text


def test_imports_and_includes_are_followed(tmp_path: Path) -> None:
    root = make_sources(tmp_path)
    (root / "cuda").mkdir()
    (root / "cuda" / "a.cu").write_text('#include "b.cuh"\n#include <cuda_fp16.h>\n')
    (root / "cuda" / "b.cuh").write_text("")
    (root / "cuda" / "a.py").write_text("KERNELS: tuple = ()\n")
    assert sources.files("cuda/a.cu", root) == ("cuda/a.cu", "cuda/b.cuh", "payload.py")
    wanted = ("payload.py", "triton/jit/bits.py", "triton/jit/double.py")
    assert sources.files("triton/jit/double.py", root) == wanted
    assert registry.declaring(root) == ("cuda.a", "triton.double")
    (root / "cuda" / "b.cuh").unlink()
    with pytest.raises(BuildError, match=r"cuda/b\.cuh.*not there"):
        sources.files("cuda/a.cu", root)


def test_checking_and_loading_need_no_triton() -> None:
    code = (
        "import sys; from hybridcomm.kernels import cubins; from hybridcomm.kernels.cubins import gate, lock; "
        "from hybridcomm.kernels.cubins import registry; lock.check(); cubins.names(); "
        "lock.check_kernels(registry.gather()); sys.exit('triton' in sys.modules or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
