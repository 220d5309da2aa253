"""Which device kernels a job runs, those built ahead of time or Triton's: agreed on by all ranks before step 0.

Both make the same bytes. But a rank that runs other code than its peers runs at another speed, and one that compiles in
the middle of training holds up all of them. So

1. each rank says what it has: its architecture, what its installation ships, its version of Triton
2. the answer follows from what all have said, and is the same on every rank (`choose`)
3. each kernel runs once; the first rank of a node alone at first: what it compiles, the others find in the node's cache
"""

from __future__ import annotations

import importlib.metadata
import os
import stat
import tempfile
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridcomm.errors import UnsupportedError
from hybridcomm.kernels.cubins.errors import ArtefactError
from hybridcomm.kernels.cubins.manifest import Manifest, digest
from hybridcomm.kernels.device_codec import DeviceCodec, device_codec, jit_codec
from hybridcomm.kernels.specs.quant import QuantSpec

if TYPE_CHECKING:
    import torch

    from hybridcomm.groups import Grouping
    from hybridcomm.kernels.cubins.launcher import Run

__all__ = ["Offer", "Route", "agree", "choose", "codec", "node_cache", "prepare", "warm_up"]

_TEXT_NBYTES = 128
_WANTED = ("auto", "shipped", "jit")


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What one rank has.

    ``arch``: compute capability (80: 8.0); ``shipped``: digest of the kernels built ahead of time, empty if none runs
    there; ``triton``: its version, empty if it is not installed; ``wanted``: auto, shipped or jit.
    """

    arch: int
    shipped: str
    triton: str
    wanted: str = "auto"

    @classmethod
    def here(cls, arch: int, wanted: str = "auto") -> Offer:
        """Of this process.

        Raises:
            ValueError: ``wanted`` is no such word.
        """
        if wanted not in _WANTED:
            raise ValueError(f"kernels={wanted!r}: write one of {', '.join(_WANTED)}")
        try:
            entries = Manifest.read().entries
        except ArtefactError:
            entries = ()
        runs = bool(entries) and all(entry.builds[0].arch <= arch for entry in entries)
        try:
            triton = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            triton = ""
        shipped = digest(*(entry.source_hash for entry in entries))[:16] if runs else ""
        return cls(arch=arch, shipped=shipped, triton=triton, wanted=wanted)

    def _encoded(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        text = "\n".join([str(self.arch), self.shipped, self.wanted, self.triton]).encode()
        return np.frombuffer(text.ljust(_TEXT_NBYTES, b"\0")[:_TEXT_NBYTES], np.uint8)

    @classmethod
    def _decoded(cls, row: np.ndarray[Any, np.dtype[np.uint8]]) -> Offer:
        arch, shipped, wanted, triton = row.tobytes().rstrip(b"\0").decode().split("\n")
        return cls(arch=int(arch), shipped=shipped, triton=triton, wanted=wanted)


@dataclass(frozen=True, kw_only=True)
class Route:
    """What all ranks do. ``shipped``: kernels built ahead of time run where there are some for a call; ``compiler``:
    Triton's compiler makes the others, or all of them; ``reason``: one line for a log."""

    shipped: bool
    compiler: bool
    reason: str


def choose(offers: Sequence[Offer]) -> Route:
    """The route that follows from what the ranks 0, 1, ... have said.

    What is shipped, where all ranks ship the same and it runs on all of their devices; else Triton's compiler, where
    all have the same version of it.

    Raises:
        UnsupportedError: ranks want different things, or what they want, or anything at all, is not there on all of
            them; names the ranks that differ from the first.
    """
    wanted = offers[0].wanted
    if others := _unlike(offers, "wanted"):
        raise UnsupportedError(f"kernels: rank 0 wants {wanted}, {others}: ask for the same everywhere")
    same_kernels = bool(offers[0].shipped) and not _unlike(offers, "shipped")
    same_compiler = bool(offers[0].triton) and not _unlike(offers, "triton")
    if same_kernels and wanted != "jit":
        return Route(shipped=True, compiler=same_compiler, reason=f"as shipped ({offers[0].shipped})")
    if same_compiler and wanted != "shipped":
        why = "asked for" if wanted == "jit" else f"nothing is shipped alike: {_said(offers, 'shipped')}"
        return Route(shipped=False, compiler=True, reason=f"by Triton {offers[0].triton}, as {why}")
    missing = [
        *([] if wanted == "jit" else [f"shipped kernels are not the same: {_said(offers, 'shipped')}"]),
        *([] if wanted == "shipped" else [f"nor is Triton: {_said(offers, 'triton')}"]),
    ]
    raise UnsupportedError(f"kernels={wanted}: {'; '.join(missing)}; install the same hybridcomm everywhere")


def _unlike(offers: Sequence[Offer], field: str) -> str:
    """Ranks whose offer is not the first one's, and what it is; empty if there are none."""
    first = getattr(offers[0], field)
    return ", ".join(
        f"rank {rank} {getattr(offer, field) or 'none'}"
        for rank, offer in enumerate(offers)
        if getattr(offer, field) != first
    )


def _said(offers: Sequence[Offer], field: str) -> str:
    return f"rank 0 has {getattr(offers[0], field) or 'none'}, {_unlike(offers, field) or 'as all others'}"


def agree(group: Grouping | None, offer: Offer) -> Route:
    """`choose` from the offers of all ranks of ``group`` (None: of this process alone); one small all-gather.

    Raises:
        UnsupportedError: as `choose`, on all ranks.
    """
    if group is None:
        return choose([offer])
    every = np.empty(_TEXT_NBYTES * group.world_size, np.uint8)
    group.all_gather(every, offer._encoded().copy())
    return choose([Offer._decoded(row) for row in every.reshape(-1, _TEXT_NBYTES)])


def codec(spec: Any, route: Route, run: Run) -> DeviceCodec:
    """The device kernels of ``spec`` on this route, launched by ``run`` where they are shipped.

    Raises:
        UnsupportedError: the route has none for this spec.
    """
    if route.shipped and any(entry.kernel.codec == str(spec) for entry in Manifest.read().entries):
        return device_codec(spec, run, jit=route.compiler)
    if not route.compiler:
        raise UnsupportedError(
            f"{spec}: no kernel is shipped for it; pip install triton, the same everywhere"
        )
    try:
        return jit_codec(spec)
    except NotImplementedError as error:
        raise UnsupportedError(f"{spec}: no device kernels on this route ({route.reason})") from error


def node_cache(environ: MutableMapping[str, str] = os.environ) -> Path:
    """Where Triton keeps what it compiled from now on: on this node's own disk, for this user alone.

    Its default is the home directory, on clusters often one file system for all nodes. ``TRITON_CACHE_DIR`` is left as
    it is.

    Raises:
        UnsupportedError: somebody else owns that folder, or others may write to it: what lies there would be run.
    """
    if "TRITON_CACHE_DIR" in environ:
        return Path(environ["TRITON_CACHE_DIR"])
    path = Path(tempfile.gettempdir()) / f"hybridcomm-{os.getuid()}" / "triton"
    for folder in (path.parent, path):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise UnsupportedError(f"{folder} is not this user's alone: remove it, or set TRITON_CACHE_DIR")
    environ["TRITON_CACHE_DIR"] = str(path)
    return path


def warm_up(
    made: DeviceCodec, device: torch.device, *, grad: torch.dtype, rest: torch.dtype, decay: float = 1.0
) -> None:
    """Runs each kernel once, on whole programs and a tail, and waits for it: loaded, and where need be compiled.

    ``grad``, ``rest``: types of gradients and residuals that the job will have.
    """
    import torch

    spec = made.spec
    numel = 2 * max(spec.block, 2048) + 16
    source = torch.zeros(numel, dtype=grad, device=device)
    e_in, e_out = (torch.zeros(numel, dtype=rest, device=device) for _ in range(2))
    payload = torch.empty(spec.nbytes(numel), dtype=torch.uint8, device=device)
    made.encode(source, e_in, e_out, payload, decay=decay)
    payloads = torch.stack([payload, payload])
    out = torch.zeros(numel, device=device)
    made.decode_add(payloads, out)
    if not isinstance(spec, QuantSpec):  # whose kernels for a cleared target are others
        made.decode_add(payloads, out, clear=True)
    if made.reencode is not None:
        made.reencode(payloads, numel, e_in, e_out, payload, decay=decay)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepare(
    group: Grouping | None,
    specs: Sequence[Any],
    *,
    run: Run,
    arch: int,
    device: torch.device,
    wanted: str = "auto",
    grad: torch.dtype,
    rest: torch.dtype,
    decay: float = 1.0,
) -> tuple[Route, tuple[DeviceCodec, ...]]:
    """The device kernels of ``specs``, chosen alike by all ranks of ``group`` and warmed up; call it before step 0.

    All ranks call it. Two barriers; they raise as a collective does when a rank does not come.

    Raises:
        UnsupportedError: see `choose`, `codec`, `node_cache`.
    """
    route = agree(group, Offer.here(arch, wanted))
    if route.compiler:
        node_cache()
    made = tuple(codec(spec, route, run) for spec in specs)
    leads = group is None or group.topology.local_rank(group.rank) == 0
    for turn in (True, False):
        if turn == leads:
            for each in made:
                warm_up(each, device, grad=grad, rest=rest, decay=decay)
        if group is not None:
            group.barrier()
    return route, made
