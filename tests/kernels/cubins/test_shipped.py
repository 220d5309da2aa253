"""The artefacts in the repository: those of its sources, within their budgets, as old as drivers need."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hybridcomm.kernels.cubins import (
    cuda_source,
    elf,
    executed,
    find,
    find_ptx,
    gate,
    lock,
    names,
    ptx,
    registry,
    roof,
    tools,
)
from hybridcomm.kernels.cubins.manifest import ARTEFACTS, Entry, Manifest
from tests.repository.layout import ROOT

pytestmark = pytest.mark.timeout(600)  # some compile, which takes a while on a busy machine

MANIFEST = Manifest.read()
ENTRIES = {entry.kernel.name: entry for entry in MANIFEST.entries}
has_triton = importlib.util.find_spec("triton") is not None and importlib.util.find_spec("torch") is not None
needs_disassembler = pytest.mark.skipif(
    tools.find("nvdisasm") is None, reason="triton is not installed: there is no nvdisasm"
)


def test_artefacts_are_those_of_the_sources() -> None:
    assert names() == tuple(sorted(ENTRIES))
    assert {entry.module for entry in MANIFEST.entries} == set(registry.declaring())
    assert lock.check() == []


def test_all_declared_kernels_are_shipped_as_declared() -> None:
    assert lock.check_kernels(registry.gather()) == []


@pytest.mark.skipif(not has_triton, reason="triton is not installed: there are no functions to ask")
def test_host_code_knows_the_arguments_of_every_function() -> None:
    """Also of what is never built beforehand. In a process of its own: loading decides whether triton interprets."""
    code = (
        "import inspect; from hybridcomm.kernels.triton import bucket, codes, gtop1, randk, topk\n"
        "families = [m.FAMILY for m in (codes, gtop1, randk, topk)]\n"
        "functions = [f for x in families for f in (x.encode, x.reencode, x.decode, x.withdraw)]\n"
        "for each in (*functions, bucket.FUNCTION):\n"
        "    names = tuple(n for n in each.load().arg_names if not n.isupper())\n"
        "    assert names == each.arguments, (each, names)\n"
        "print(len(functions))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=500
    )
    assert done.stdout.strip() == "16", done.stderr


def test_the_pinned_triton_built_them() -> None:
    pinned = re.search(r"^triton==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert MANIFEST.toolchain["triton"] == pinned[1]
    assert MANIFEST.toolchain["ptxas"].startswith("12.")


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_an_entry_is_what_its_images_say(name: str) -> None:
    """Symbol, block, registers, shared memory and parameters, from the ELF file; the PTX's from its text."""
    entry = ENTRIES[name]
    assert [build.arch for build in entry.builds] == sorted(entry.kernel.archs)
    layout = tuple((p.offset, p.nbytes) for p in entry.parameters)
    for build in entry.builds:
        told, text = elf.read(find(name, build.arch).data), find_ptx(name, build.arch).data[:-1].decode()
        assert (told.symbol, told.threads, told.parameters) == (entry.symbol, entry.threads, layout)
        kept = (build.registers, build.static_shared, build.figures.frame)
        assert (told.registers, told.shared, told.frame) == kept
        read = ptx.read(text)
        assert (read.symbol, read.target, read.version) == (
            entry.symbol,
            f"sm_{build.arch}",
            ptx.ISA[build.arch],
        )
        assert read.parameters == tuple(p.nbytes for p in entry.parameters)
    assert find_ptx(name).data == find_ptx(name, 80).data


def test_the_gate_finds_nothing() -> None:
    """What it must find, `test_gate` plants."""
    found = {
        f"{entry.kernel.name} sm_{build.arch} {violation.rule}"
        for entry in MANIFEST.entries
        for build in entry.builds
        for violation in gate.judge(entry.kernel, build)
    }
    assert not found


def test_everything_is_counted_for_every_architecture() -> None:
    archs = {name: set(entry.kernel.archs) for name, entry in ENTRIES.items()}
    assert {name: set(row) for name, row in executed.read().items()} == archs


def test_budgets_are_no_allowances() -> None:
    """A twentieth above what the worst of the architectures takes, or one instruction."""
    loose = {}
    for name, entry in ENTRIES.items():
        most = max(roof.work(entry.kernel, build)["issue"] for build in entry.builds)
        if not most <= entry.kernel.budget.instructions <= max(1.05 * most, most + 1):
            loose[name] = most, entry.kernel.budget.instructions
    assert not loose


@needs_disassembler
@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_figures_are_those_of_the_machine_code(name: str) -> None:
    """Of one architecture, each in its turn: disassembling takes longest of all that is done here."""
    entry = ENTRIES[name]
    build = entry.builds[sorted(ENTRIES).index(name) % len(entry.builds)]
    cubin, text = find(name, build.arch).data, find_ptx(name, build.arch).data[:-1].decode()
    assert gate.measure(entry.kernel, cubin, text) == build.figures, "run `make cubins ARGS=--force`"


@pytest.mark.skipif(tools.find("cuobjdump") is None, reason="triton is not installed: there is no cuobjdump")
@pytest.mark.parametrize("name", sorted(ENTRIES)[:1])
def test_the_reader_of_cubins_agrees_with_nvidias(name: str, tmp_path: Path) -> None:
    entry = ENTRIES[name]
    for build in entry.builds:
        data = find(entry.kernel.name, build.arch).data
        (tmp_path / "one.cubin").write_bytes(data)
        command = [str(tools.find("cuobjdump")), "-res-usage", str(tmp_path / "one.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", done.stdout + done.stderr)
        assert usage is not None
        told = elf.read(data)
        assert tuple(map(int, usage.groups())) == (told.registers, told.frame, told.shared)


def _smallest(suffix: str) -> Entry:
    of_kind = [entry for entry in MANIFEST.entries if entry.kernel.source.endswith(suffix)]
    return min(of_kind, key=lambda entry: (ARTEFACTS / f"{entry.kernel.name}.xz").stat().st_size)


def _missing(suffix: str) -> str:
    """What keeps sources of a kind from being built here."""
    if not has_triton:
        return "triton is not installed: nothing is rebuilt"
    if suffix == ".cu" and cuda_source.find() is None:
        return "NVRTC is not installed: CUDA C++ is not compiled here"
    return ""


@pytest.mark.parametrize("suffix", sorted({Path(entry.kernel.source).suffix for entry in MANIFEST.entries}))
def test_building_again_gives_the_same_bytes(suffix: str) -> None:
    """In a process of its own, since triton may have been loaded as an interpreter here."""
    if reason := _missing(suffix):
        pytest.skip(reason)
    entry = _smallest(suffix)
    code = (
        "from hybridcomm.kernels.cubins.build import entry_of; from hybridcomm.kernels.cubins.manifest import *; "
        f"m = Manifest.read(); e = next(e for e in m.entries if e.kernel.name == {entry.kernel.name!r}); "
        "made, packed = entry_of(e.module, e.kernel, m.toolchain, e.sources); "
        "assert made == e; assert packed == (ARTEFACTS / f'{e.kernel.name}.xz').read_bytes()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr
