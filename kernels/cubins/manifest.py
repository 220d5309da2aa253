"""What ``artefacts/manifest.json`` holds: each shipped kernel, what it was built from, how it is launched, its images.

The images of one kernel are compressed together, into ``artefacts/NAME.xz``: those of neighbouring architectures share
much. JSON is sorted, one line per kernel, so that a rebuild that changes nothing changes no byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridcomm.kernels.cubins.errors import ArtefactError
from hybridcomm.kernels.device import Argument, Budget, DeviceKernel

__all__ = [
    "ARTEFACTS",
    "FORMAT",
    "Blob",
    "Build",
    "Entry",
    "Figures",
    "Manifest",
    "Parameter",
    "Stream",
    "digest",
    "pack",
    "unpack",
]

FORMAT = 2
ARTEFACTS = Path(__file__).parent / "artefacts"
_MANIFEST = "manifest.json"
_FILTERS: list[dict[str, Any]] = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One entry of the kernel's parameter buffer; ``nbytes`` and ``offset`` in bytes.

    ``hidden``: appended by Triton (pointers to global and to profiling scratch memory). Kernels that need scratch
    memory are not built, so a launcher passes null there.
    """

    name: str
    type: str
    nbytes: int
    offset: int
    hidden: bool = False


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A stretch of the unpacked artefact, in bytes, and its sha256."""

    offset: int
    nbytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Bytes per element through one array of floats, in one direction, by PTX. ``itemsize``: of its elements.

    ``wide``: of accesses of 128 bits and more; ``narrow``: of smaller ones that always run; ``guarded``: of those that
    need not (edges, rare paths).
    """

    name: str
    store: bool
    itemsize: int
    wide: float
    narrow: float
    guarded: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the gate measured of one cubin and its PTX.

    ``frame``: bytes of stack; ``local``: accesses to local memory; ``instructions`` and ``pipes``: static, of one
    thread, per element; ``loops``: of the machine code; ``looped``: of ``pipes``, what stands in loops; ``forbidden``:
    (rule, what was found).
    """

    frame: int
    local: int
    instructions: float
    pipes: Mapping[str, float]
    loops: int
    looped: Mapping[str, float]
    streams: tuple[Stream, ...]
    forbidden: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Build:
    """What came out for one architecture.

    ``registers``: per thread; ``static_shared``, ``dynamic_shared``: bytes per block, the second one to be passed at
    the launch; ``ptx``: what ``cubin`` was assembled from.
    """

    arch: int
    registers: int
    static_shared: int
    dynamic_shared: int
    cubin: Blob
    ptx: Blob
    figures: Figures


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One kernel. ``symbol``: its entry point, the same in all images; ``threads``: per block, in x.

    ``builds``: by architecture, the oldest first; its PTX serves those that have no cubin. ``sources``: sha256 of each
    file that it was built from, by path below ``kernels/``; ``source_hash``: see `lock.source_hash`.
    """

    kernel: DeviceKernel
    module: str
    symbol: str
    threads: int
    parameters: tuple[Parameter, ...]
    builds: tuple[Build, ...]
    sources: Mapping[str, str]
    source_hash: str


def digest(*parts: Any) -> str:
    """sha256 of plain data, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def pack(content: bytes) -> bytes:
    """As artefacts are compressed: xz without its own checksum, since the manifest has better ones."""
    return lzma.compress(content, format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE, filters=_FILTERS)


def unpack(folder: Path, name: str) -> bytes:
    """The images of one kernel, one after the other.

    Raises:
        ArtefactError: the file is missing or no xz.
    """
    path = folder / f"{name}.xz"
    try:
        return lzma.decompress(path.read_bytes())
    except OSError as error:
        raise ArtefactError(f"{path.name}: {error.strerror}; run `make cubins`") from error
    except lzma.LZMAError as error:
        raise ArtefactError(f"{path.name}: {error}; run `make cubins`") from error


def _kernel(data: Mapping[str, Any]) -> DeviceKernel:
    fields = dict(data)
    fields["arguments"] = tuple(Argument(**argument) for argument in data["arguments"])
    fields["constants"] = tuple((name, value) for name, value in data["constants"])
    fields["budget"] = Budget(**data["budget"])
    fields["archs"], fields["touched"] = tuple(data["archs"]), tuple(data.get("touched", ()))
    return DeviceKernel(**fields)


def _figures(data: Mapping[str, Any]) -> Figures:
    fields = dict(data)
    fields["streams"] = tuple(Stream(**stream) for stream in data["streams"])
    fields["forbidden"] = tuple((rule, what) for rule, what in data["forbidden"])
    return Figures(**fields)


def _build(data: Mapping[str, Any]) -> Build:
    parts = {"cubin": Blob(**data["cubin"]), "ptx": Blob(**data["ptx"]), "figures": _figures(data["figures"])}
    return Build(**{**data, **parts})


def _entry(data: Mapping[str, Any]) -> Entry:
    fields = dict(data)
    fields["kernel"] = _kernel(data["kernel"])
    fields["parameters"] = tuple(Parameter(**parameter) for parameter in data["parameters"])
    fields["builds"] = tuple(map(_build, data["builds"]))
    return Entry(**fields)


def _line(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``toolchain``: name -> version of what built the artefacts; ``entries``: sorted by the kernel's name."""

    toolchain: Mapping[str, str]
    entries: tuple[Entry, ...]

    def text(self) -> str:
        """The JSON, stable: one line per entry."""
        lines = [_line(dataclasses.asdict(entry)) for entry in self.entries]
        entries, toolchain = ",\n".join(lines), _line(dict(self.toolchain))
        return f'{{"format": {FORMAT}, "toolchain": {toolchain}, "entries": [\n{entries}\n]}}\n'

    def write(self, folder: Path = ARTEFACTS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MANIFEST).write_text(self.text(), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path = ARTEFACTS) -> Manifest:
        """The manifest of a folder of artefacts; an empty one where there is none.

        Raises:
            ArtefactError: a manifest of another format.
        """
        path = folder / _MANIFEST
        if not path.exists():
            return cls(toolchain={}, entries=())
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ArtefactError(f"{path.name}: format {data['format']}, not {FORMAT}; run `make cubins`")
        return cls(toolchain=data["toolchain"], entries=tuple(map(_entry, data["entries"])))
