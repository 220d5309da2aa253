"""Whether the artefacts are those of the sources: needs neither Triton nor nvcc nor a GPU."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

from hybridcomm.kernels.cubins import registry, sources
from hybridcomm.kernels.cubins.errors import ArtefactError, BuildError
from hybridcomm.kernels.cubins.manifest import ARTEFACTS, Blob, Build, Entry, Manifest, digest, unpack
from hybridcomm.kernels.device import DeviceKernel

__all__ = ["check", "check_kernels", "intact", "source_hash"]

REMEDY = "run `make cubins`"


_SAID = ("budget", "codec", "tail", "trips")
"""Of a kernel's declaration, what its artefact and the figures of it do not depend on."""


def source_hash(kernel: DeviceKernel, toolchain: Mapping[str, str], files: Mapping[str, str]) -> str:
    """sha256 of everything that a kernel is built from, and of nothing else."""
    built = {name: value for name, value in dataclasses.asdict(kernel).items() if name not in _SAID}
    return digest(built, dict(toolchain), dict(files))


def _blobs(build: Build) -> tuple[tuple[str, Blob], ...]:
    return ("cubin", build.cubin), ("PTX", build.ptx)


def intact(entry: Entry, folder: Path = ARTEFACTS) -> list[str]:
    """What is wrong with a kernel's artefact, one line each."""
    try:
        content = unpack(folder, entry.kernel.name)
    except ArtefactError as error:
        return [str(error)]
    blobs = {f"{what} for sm_{build.arch}": blob for build in entry.builds for what, blob in _blobs(build)}
    problems = [
        f"{entry.kernel.name}: the {what} is not the one that was built; {REMEDY}"
        for what, blob in blobs.items()
        if hashlib.sha256(content[blob.offset : blob.offset + blob.nbytes]).hexdigest() != blob.sha256
    ]
    if len(content) != sum(blob.nbytes for blob in blobs.values()):
        problems.append(
            f"{entry.kernel.name}: the artefact holds {len(content)} bytes, not all of them told; {REMEDY}"
        )
    return problems


def _stale(entry: Entry, manifest: Manifest, root: Path) -> list[str]:
    name = entry.kernel.name
    try:
        now = sources.hashes(entry.kernel.source, root)
    except (BuildError, OSError) as error:
        return [f"{name}: {error}; {REMEDY}"]
    changed = sorted(file for file in {*now, *entry.sources} if now.get(file) != entry.sources.get(file))
    if changed:
        return [f"{name}: {', '.join(changed)} changed since it was built; {REMEDY}"]
    if entry.source_hash != source_hash(entry.kernel, manifest.toolchain, now):
        return [f"{name}: the manifest's entry was changed by hand; {REMEDY}"]
    return []


def check(root: Path = registry.ROOT, folder: Path = ARTEFACTS) -> list[str]:
    """What keeps the artefacts in ``folder`` from being those of the sources below ``root``; empty if nothing does."""
    try:
        manifest = Manifest.read(folder)
    except ArtefactError as error:
        return [str(error)]
    problems = [
        line
        for entry in manifest.entries
        for line in [*_stale(entry, manifest, root), *intact(entry, folder)]
    ]
    built = {entry.module for entry in manifest.entries}
    problems += [
        f"{m}: its KERNELS were never built; {REMEDY}" for m in registry.declaring(root) if m not in built
    ]
    names = {f"{entry.kernel.name}.xz" for entry in manifest.entries}
    strange = sorted(path.name for path in folder.glob("*.xz") if path.name not in names)
    return problems + [f"{name}: an artefact that the manifest does not know; {REMEDY}" for name in strange]


def check_kernels(kernels: Mapping[str, tuple[DeviceKernel, ...]], folder: Path = ARTEFACTS) -> list[str]:
    """Likewise for the declarations, as ``registry.gather`` has them: settings and budgets are none of the sources."""
    declared = {kernel.name: kernel for of_module in kernels.values() for kernel in of_module}
    built = {entry.kernel.name: entry.kernel for entry in Manifest.read(folder).entries}
    return [
        f"{name}: built as it is not declared; {REMEDY}"
        for name in sorted({*declared, *built})
        if declared.get(name) != built.get(name)
    ]
