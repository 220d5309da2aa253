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
from tests.kernels.cubins.fakes import KERNEL, make_artefacts, make_sources


@pytest.fixture
def tree(tmp_path: Path) -> tuple[Path, Path]:
    root = make_sources(tmp_path / "kernels")
    make_artefacts(tmp_path / "artefacts", root)
    return root, tmp_path / "artefacts"


def test_what_was_built_is_not_stale(tree: tuple[Path, Path]) -> None:
    assert lock.check(*tree) == []


@pytest.mark.parametrize("name", ["payload.py", "triton/bits.py", "triton/double.py"])
def test_one_byte_of_a_source_is_seen(tree: tuple[Path, Path], name: str) -> None:
    (tree[0] / name).write_text((tree[0] / name).read_text() + " ")
    (problem,) = lock.check(*tree)
    assert f"double: {name} changed" in problem
    assert "`make cubins`" in problem


def test_a_source_of_others_is_none_of_its(tree: tuple[Path, Path]) -> None:
    (tree[0] / "triton" / "other.py").write_text("x = 1\n")
    assert lock.check(*tree) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def rename(folder: Path) -> None:
    (folder / "double.xz").rename(folder / "twice.xz")


def edit(folder: Path) -> None:
    """Another budget, by hand."""
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
    (root / "cuda" / "a.py").write_text(
        "from hybridcomm.kernels.triton.bits import power\nKERNELS: tuple = ()\n"
    )
    wanted = ("cuda/a.cu", "cuda/a.py", "cuda/b.cuh", "payload.py", "triton/bits.py")
    assert sources.files("cuda.a", "cuda/a.cu", root) == wanted
    assert registry.declaring(root) == ("cuda.a", "triton.double")
    (root / "cuda" / "b.cuh").unlink()
    with pytest.raises(BuildError, match=r"cuda/b\.cuh.*not there"):
        sources.files("cuda.a", "cuda/a.cu", root)


def test_checking_and_loading_need_no_triton() -> None:
    code = (
        "import sys; from hybridcomm.kernels import cubins; from hybridcomm.kernels.cubins import gate, lock; "
        "lock.check(); cubins.names(); sys.exit('triton' in sys.modules or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
