"""Sources and artefacts of kernels that no compiler has seen: what reads them needs no more."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hybridcomm.kernels.cubins import sources
from hybridcomm.kernels.cubins.lock import source_hash
from hybridcomm.kernels.cubins.manifest import Blob, Build, Entry, Figures, Manifest, Parameter, pack
from hybridcomm.kernels.device import Argument, Budget, DeviceKernel

__all__ = ["FIGURES", "KERNEL", "TOOLCHAIN", "make_artefacts", "make_sources"]

TOOLCHAIN = {"ptxas": "12.9.86", "triton": "3.9.0"}
FIGURES = Figures(
    frame=0,
    local=0,
    instructions=4.0,
    pipes={"alu": 3.0, "lsu": 1.0},
    loops=0,
    looped={},
    streams=(),
    forbidden=(),
)
KERNEL = DeviceKernel(
    name="double",
    source="triton/jit/double.py",
    function="_double",
    arguments=(
        Argument(name="grad", type="*fp32"),
        Argument(name="count", type="i32", aligned=False),
        Argument(name="numel", type="i64"),
        Argument(name="weight", type="fp32", aligned=False),
    ),
    constants=(("BLOCK", 512),),
    num_warps=4,
    elements=512,
    budget=Budget(nbytes=8.0, instructions=10, registers=64),
    codec="int8",
    archs=(80, 90),
)
_FILES = {
    "payload.py": "HEADER_NBYTES = 64\n",
    "triton/jit/bits.py": "def power(e):\n    return e\n",
    "triton/jit/double.py": "from hybridcomm.kernels.triton.jit import bits\n",
    "triton/jit/other.py": "import hybridcomm.kernels.triton.jit.bits\n",
    "triton/launch.py": "from hybridcomm.kernels.triton import double\n",
    "triton/double.py": "from hybridcomm.kernels.triton import launch\nKERNELS = ()\n",
}


def make_sources(root: Path) -> Path:
    """A tree as below ``kernels/``."""
    for name, text in _FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def make_artefacts(folder: Path, root: Path) -> Manifest:
    """A manifest and an artefact of ``KERNEL``, as a build from ``root`` would write them."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = [f"{what} {arch}".encode() for what in ("cubin", "ptx") for arch in KERNEL.archs]
    blobs, end = [], 0
    for content in contents:
        blobs.append(Blob(offset=end, nbytes=len(content), sha256=hashlib.sha256(content).hexdigest()))
        end += len(content)
    builds = tuple(
        Build(
            arch=arch,
            registers=24,
            static_shared=0,
            dynamic_shared=128,
            cubin=blobs[i],
            ptx=blobs[i + len(KERNEL.archs)],
            figures=FIGURES,
        )
        for i, arch in enumerate(KERNEL.archs)
    )
    files = sources.hashes(KERNEL.source, root)
    entry = Entry(
        kernel=KERNEL,
        module="triton.double",
        symbol="_double",
        threads=128,
        parameters=(
            Parameter(name="grad", type="*fp32", nbytes=8, offset=0),
            Parameter(name="count", type="i32", nbytes=4, offset=8),
            Parameter(name="numel", type="i64", nbytes=8, offset=16),
            Parameter(name="weight", type="fp32", nbytes=4, offset=24),
            Parameter(name="global_scratch", type="*u8", nbytes=8, offset=32, hidden=True),
        ),
        builds=builds,
        sources=files,
        source_hash=source_hash(KERNEL, TOOLCHAIN, files),
    )
    manifest = Manifest(toolchain=TOOLCHAIN, entries=(entry,))
    (folder / "double.xz").write_bytes(pack(b"".join(contents)))
    manifest.write(folder)
    return manifest
