"""Builds the device kernels ahead of time: source -> PTX -> cubin for each architecture, without a GPU.

Triton (``.py``) or NVRTC (``.cu``) make PTX, ptxas of CUDA 12 assembles it, for both alike. The same sources and the
same toolchain give the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybridcomm.kernels.cubins import cuda_source, elf, gate, ptx, registry, sources, tools, triton_source
from hybridcomm.kernels.cubins.errors import ArtefactError, BuildError
from hybridcomm.kernels.cubins.lock import intact, source_hash
from hybridcomm.kernels.cubins.manifest import ARTEFACTS, Blob, Build, Entry, Manifest, Parameter, pack
from hybridcomm.kernels.device import DeviceKernel

__all__ = ["Compiled", "build", "compile_kernel", "entry_of", "toolchain"]

_NBYTES = {"1": 1, "8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A kernel for one architecture; ``told`` is what its cubin says."""

    arch: int
    text: str
    cubin: bytes
    dynamic_shared: int
    told: elf.Cubin
    parameters: tuple[Parameter, ...]


def toolchain(kernels: Mapping[str, tuple[DeviceKernel, ...]]) -> dict[str, str]:
    """Versions of what builds them; NVRTC's only where there is CUDA C++."""
    found = {"ptxas": tools.ptxas_version(), "triton": triton_source.version()}
    if any(kernel.source.endswith(".cu") for of_module in kernels.values() for kernel in of_module):
        found["nvrtc"] = cuda_source.version()
    return found


def _parameters(kernel: DeviceKernel, hidden: tuple[str, ...]) -> tuple[Parameter, ...]:
    """The parameter buffer: each at the next multiple of its size."""
    table, end = [], 0
    named = [(a.name, a.type, False) for a in kernel.arguments] + [(name, "*u8", True) for name in hidden]
    for name, kind, is_hidden in named:
        nbytes = 8 if kind.startswith("*") else _NBYTES[kind.lstrip("iufpb")]
        offset = -(-end // nbytes) * nbytes
        table.append(Parameter(name=name, type=kind, nbytes=nbytes, offset=offset, hidden=is_hidden))
        end = offset + nbytes
    return tuple(table)


def compile_kernel(kernel: DeviceKernel, arch: int, fn: Any = None) -> Compiled:
    """One kernel for one architecture. ``fn``: the jit function, if it is not the one that ``kernel.source`` has.

    Raises:
        BuildError: it does not compile, or PTX and cubin disagree with ``kernel`` on parameters or block.
    """
    if kernel.source.endswith(".cu"):
        text, dynamic_shared = cuda_source.compile_ptx(kernel, arch), 0
    else:
        text, dynamic_shared = triton_source.compile_ptx(fn or triton_source.function(kernel), kernel, arch)
    hidden = () if kernel.source.endswith(".cu") else triton_source.HIDDEN
    cubin = tools.assemble(text, arch)
    told, parameters, read = elf.read(cubin), _parameters(kernel, hidden), ptx.read(text)
    layout = tuple((p.offset, p.nbytes) for p in parameters)
    if told.parameters != layout or read.parameters != tuple(p.nbytes for p in parameters):
        raise BuildError(
            f"{kernel.name}: parameters at {told.parameters}, by its arguments they are at {layout}"
        )
    if told.threads != 32 * kernel.num_warps or told.symbol != read.symbol:
        raise BuildError(
            f"{kernel.name}: a block of {told.threads} threads, {kernel.num_warps} warps were asked for"
        )
    return Compiled(
        arch=arch, text=text, cubin=cubin, dynamic_shared=dynamic_shared, told=told, parameters=parameters
    )


def entry_of(
    module: str, kernel: DeviceKernel, made: Mapping[str, str], files: Mapping[str, str]
) -> tuple[Entry, bytes]:
    """A kernel's entry of the manifest, and its artefact. ``made``: the toolchain; ``files``: its sources' hashes."""
    compiled = [compile_kernel(kernel, arch) for arch in sorted(kernel.archs)]
    first = compiled[0]
    if len({(c.told.symbol, c.parameters) for c in compiled}) != 1:
        raise BuildError(f"{kernel.name}: another symbol or other parameters on another architecture")
    # Likes together: they compress better.
    contents = [c.cubin for c in compiled] + [c.text.encode() for c in compiled]
    ends = list(itertools.accumulate(map(len, contents)))
    blobs = [
        Blob(offset=end - len(content), nbytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for content, end in zip(contents, ends, strict=True)
    ]
    builds = tuple(
        Build(
            arch=c.arch,
            registers=c.told.registers,
            static_shared=c.told.shared,
            dynamic_shared=c.dynamic_shared,
            cubin=cubin,
            ptx=text,
            figures=gate.measure(kernel, c.cubin, c.text),
        )
        for c, cubin, text in zip(compiled, blobs, blobs[len(compiled) :], strict=False)
    )
    entry = Entry(
        kernel=kernel,
        module=module,
        symbol=first.told.symbol,
        threads=32 * kernel.num_warps,
        parameters=first.parameters,
        builds=builds,
        sources=files,
        source_hash=source_hash(kernel, made, files),
    )
    return entry, pack(b"".join(contents))


def _before(folder: Path) -> dict[str, Entry]:
    """What was built, by name; nothing of it where the manifest is of another format."""
    try:
        return {entry.kernel.name: entry for entry in Manifest.read(folder).entries}
    except ArtefactError:
        return {}


_Todo = tuple[str, DeviceKernel, dict[str, str], dict[str, str]]


def _results(todo: list[_Todo], jobs: int) -> Iterator[tuple[Entry, bytes]]:
    """``entry_of`` of each, in order; by several processes if that is worth loading Triton in each."""
    workers = min(jobs, len(todo) // 2)
    if workers < 2:
        yield from itertools.starmap(entry_of, todo)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(entry_of, *zip(*todo, strict=True))


def build(
    folder: Path = ARTEFACTS,
    *,
    force: bool = False,
    jobs: int | None = None,
    say: Callable[[str], None] = print,
) -> Manifest:
    """Builds what is missing or stale (``force``: everything) and writes artefacts and manifest.

    Figures of what is kept are kept too: after a change of the gate, force.

    Raises:
        BuildError: a tool is missing, or a kernel does not compile.
    """
    kernels = registry.gather()
    made, before = toolchain(kernels), _before(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Entry] = {}
    todo: list[_Todo] = []
    for module, of_module in kernels.items():
        for kernel in of_module:
            files, old = sources.hashes(kernel.source), before.get(kernel.name)
            wanted = source_hash(kernel, made, files)
            if not force and old is not None and old.source_hash == wanted and not intact(old, folder):
                kept[kernel.name] = replace(old, kernel=kernel, module=module)  # budgets may have changed
            else:
                todo.append((module, kernel, made, files))
    say(f"{len(todo)} kernels to build, {len(kept)} are up to date")
    try:
        for entry, packed in _results(todo, jobs or len(os.sched_getaffinity(0))):
            kept[entry.kernel.name] = entry
            (folder / f"{entry.kernel.name}.xz").write_bytes(packed)
            say(f"{entry.kernel.name}: {len(packed)} bytes")
    finally:  # an interrupted build goes on where it was
        manifest = Manifest(toolchain=made, entries=tuple(kept[name] for name in sorted(kept)))
        manifest.write(folder)
    for path in folder.glob("*.xz"):
        if path.stem not in kept:
            path.unlink()
    return manifest
