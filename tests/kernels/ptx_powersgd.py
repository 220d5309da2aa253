"""powersgd's kernels behind their host code, executed as PTX; the oracle likewise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hybridcomm.kernels import HEADER_NBYTES, reference
from hybridcomm.kernels.cuda import launch_powersgd, powersgd
from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.kernels.oracles import powersgd as oracle
from hybridcomm.kernels.payload import HEADER_DTYPE
from tests.kernels.cases import DIGEST, Bytes, Floats
from tests.kernels.ptx_run import PtxRun
from tests.kernels.ptx_sparse import narrowed, tensor, widened
from tests.kernels.sparse_cases import SEED
from tests.ptx import Memory
from tests.ptx.conformance import Executable

__all__ = [
    "added",
    "columns_right",
    "dependent",
    "encoded",
    "huge",
    "largest_right",
    "payload_of",
    "reencoded",
    "wanted",
]


def seen(values: Floats, kind: str) -> Floats:
    """What a kernel reads of values that it gets in a type."""
    return widened(narrowed(values, kind), kind)


def _made(run: PtxRun, spec: Any, numel: int, rest: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A residual and a payload that hold what nobody may read, the latter behind its header."""
    e_out = tensor(np.full(numel, 77, np.float32), rest)
    if numel:
        run.hold(e_out, np.zeros(e_out.untyped_storage().nbytes(), np.bool_))
    return e_out, torch.full((spec.nbytes(numel),), 0xA5, dtype=torch.uint8)


def encoded(
    run: PtxRun,
    spec: Any,
    grad: Floats,
    e_in: Floats | None,
    types: tuple[str, str] = ("fp32", "fp32"),
    decay: float = 1.0,
) -> tuple[bytes, bytes]:
    """Payload and new residual, the latter widened. ``types``: of gradient and residual."""
    e_out, payload = _made(run, spec, grad.size, types[1])
    source = None if e_in is None else tensor(e_in, types[1])
    launch_powersgd.encode(
        run, spec, tensor(grad, types[0]), source, e_out, payload, DIGEST, decay=decay, seed=SEED
    )
    return payload.numpy().tobytes(), e_out.float().numpy().tobytes()


def wanted(
    spec: Any,
    grad: Floats,
    e_in: Floats | None,
    types: tuple[str, str] = ("fp32", "fp32"),
    decay: float = 1.0,
) -> tuple[bytes, bytes]:
    """The oracle on widened inputs; its residual rounded half to even."""
    payload, e_out = np.zeros(spec.nbytes(grad.size), np.uint8), np.zeros(grad.size, np.float32)
    source = None if e_in is None else seen(e_in, types[1])
    reference.encode(spec, seen(grad, types[0]), source, e_out, payload, DIGEST, decay=decay, seed=SEED)
    return payload.tobytes(), seen(e_out, types[1]).tobytes()


def payload_of(spec: Any, grad: Floats, seed: int = SEED) -> Bytes:
    """The oracle's, without a residual."""
    payload = np.zeros(spec.nbytes(grad.size), np.uint8)
    reference.encode(spec, grad, None, None, payload, DIGEST, seed=seed)
    return payload


def added(
    run: PtxRun, spec: Any, payloads: Sequence[Bytes], out: Floats, weight: float, *, clear: bool = False
) -> bytes:
    """``out`` with payloads added by the kernels; ``clear``: to zeros, whatever it holds."""
    made = torch.from_numpy(out.copy())
    if clear:
        run.hold(made, np.zeros(out.nbytes, np.bool_))
    given = torch.from_numpy(np.stack(payloads))
    launch_powersgd.decode_add(run, spec, given, made, weight, DIGEST, clear=clear)
    return made.numpy().tobytes()


def reencoded(  # noqa: PLR0917
    run: PtxRun,
    spec: Any,
    payloads: Sequence[Bytes],
    e_in: Floats | None,
    numel: int,
    rest: str,
    decay: float,
) -> tuple[bytes, bytes]:
    """Payload and new residual of a sum with weight 0.25."""
    e_out, payload = _made(run, spec, numel, rest)
    source = None if e_in is None else tensor(e_in, rest)
    launch_powersgd.reencode(
        run, spec, torch.from_numpy(np.stack(payloads)), numel, source, e_out, payload, DIGEST,
        weight=0.25, decay=decay, seed=SEED,
    )  # fmt: skip
    return payload.numpy().tobytes(), e_out.float().numpy().tobytes()


def huge(numel: int) -> Floats:
    """One magnitude of 2^100, so that nothing is sent."""
    values = np.random.default_rng(1).standard_normal(numel).astype(np.float32)
    values[numel // 2] = 2.0**100
    return values


def dependent(numel: int) -> Floats:
    """Rows that are all multiples of one: what is left of a second column is a rounding error."""
    row = np.random.default_rng(2).standard_normal(512).astype(np.float32)
    return (row * np.arange(1, numel // 512 + 1, dtype=np.float32)[:, None]).reshape(-1)


class _First(PtxRun):
    """A device that runs the first pass alone."""

    def __call__(self, kernel: DeviceKernel, programs: int, arguments: Mapping[str, Any]) -> None:
        if "encode" in kernel.name:
            super().__call__(kernel, programs, arguments)


def largest_right(spec: Any, load: Callable[[DeviceKernel, int], Executable], arch: int) -> bool:
    """Whether the first pass finds the largest magnitude wherever it is: each element of a thread, in any thread."""
    dice, run = np.random.default_rng(6), _First(arch=arch, load=load)
    small, nothing = dice.standard_normal(4096).astype(np.float32), np.zeros(4096, np.float32)
    unsent = torch.from_numpy(payload_of(spec, huge(4096)))[None]
    e_out, payload = torch.zeros(4096), torch.zeros(spec.nbytes(4096), dtype=torch.uint8)
    for element in range(32):
        grad = small.copy()
        place = element // 4 * 512 + int(dice.integers(128)) * 4 + element % 4
        grad[place] = dice.choice([-1e6, 1e6])
        for again in (False, True):
            if again:
                source = torch.from_numpy(grad)
                launch_powersgd.reencode(run, spec, unsent, 4096, source, e_out, payload, DIGEST)
            else:
                source = torch.from_numpy(nothing)
                launch_powersgd.encode(run, spec, torch.from_numpy(grad), source, e_out, payload)
            if payload[40:44].numpy().view(np.float32)[0] != 1e6:
                return False
    return True


ROOTS = (
    ("0x1.ff1fe6p+0", "0x1.8ee68p-3"),
    ("0x1.7c63cap+0", "0x1.c131fap-3"),
    ("0x1.c14896p+0", "0x1.471f1cp-4"),
    ("0x1.87ea86p+0", "0x1.f8d3p-4"),
)
"""Columns of two, the root of whose energy, or its reciprocal, `root.cuh` first has too large or too small."""


def columns_right(spec: Any, load: Callable[[DeviceKernel, int], Executable], arch: int) -> bool:
    """Whether `orthonormal` alone is right: nearly parallel columns, of more rows than it multiplies at a time and of
    fewer, which a whole region would take long to bring, and energies that are hard to take the root of."""
    dice = np.random.default_rng(4)
    for rows, first in ((2101, None), (700, None), (793, None), *((2, pair) for pair in ROOTS)):
        left = dice.standard_normal((spec.rank, rows)).astype(np.float32)
        if first is not None:
            left[0] = [float.fromhex(text) for text in first]
        left[1:] = left[0] + left[1:] * np.float32(0.05)
        if not _orthonormal_right(spec, left, load, arch):
            return False
    return True


def _orthonormal_right(
    spec: Any, left: Floats, load: Callable[[DeviceKernel, int], Executable], arch: int
) -> bool:
    kernel = next(kernel for kernel in powersgd.KERNELS if kernel.name == f"powersgd{spec.rank}_orthonormal")
    rows = left.shape[1]
    begin, behind, nbytes = spec.offsets(512 * rows)
    end = begin + left.nbytes
    want, given, known = (
        np.zeros(nbytes, np.uint8),
        np.full(nbytes, 0xA5, np.uint8),
        np.zeros(nbytes, np.bool_),
    )
    want[HEADER_NBYTES] = 127
    want[begin:end] = oracle.orthonormal(left.copy()).reshape(-1).view(np.uint8)
    given[:HEADER_NBYTES], given[begin:end] = 0, left.reshape(-1).view(np.uint8)
    given[:HEADER_NBYTES].view(HEADER_DTYPE)["flags"] = np.float32(1.5).view(np.uint32)
    known[:HEADER_NBYTES] = known[begin:end] = True
    want[:HEADER_NBYTES].view(HEADER_DTYPE)["checksum"] = reference.checksum(want)
    memory = Memory()
    at = memory.place(given, initialised=known)
    load(kernel, arch).launch(memory, kernel.elements, payload=at, numel=512 * rows - 16)
    return bool((memory.read(at)[:behind] == want[:behind]).all())
