"""Inputs and comparisons that the tests of this folder share: what to encode, how to compare encoders."""

from __future__ import annotations

import ctypes
import functools
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from hybridcomm.kernels import Spec, TopKSpec, reference
from hybridcomm.kernels.vectors import KINDS, values
from hybridcomm.selftest.kernels import DIGEST

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Encoder = Callable[[Any, Floats, "Floats | None", "Floats | None", Bytes, int], int]


def edge_sizes(spec: Spec) -> tuple[int, ...]:
    """Empty, one, around k, around one block, several blocks and a tail."""
    *_, block, k = spec.params
    sizes = {0, 1, k - 1, k, k + 1, block - 1, block, block + 1, 2 * block, 3 * block + block // 2 + 1}
    return tuple(sorted(size for size in sizes if size >= 0))


SPECS = tuple(
    TopKSpec(block=block, k=k, value_bits=bits)
    for block, k, bits in (
        (16, 1, None),
        (16, 16, None),
        (32, 3, 4),
        (64, 5, 3),
        (256, 3, 8),
        (512, 70, None),
        (1024, 10, None),
        (1024, 10, 4),
        (1024, 1024, None),
        (4096, 41, None),
    )
)


@dataclass(frozen=True, kw_only=True)
class Case:
    spec: Any
    kind: str
    numel: int
    seed: int
    memoryless: bool = False

    def inputs(self) -> tuple[Floats, Floats | None]:
        grad, e_in = values(self.kind, self.numel, self.seed)
        return grad, None if self.memoryless else e_in


def specs() -> st.SearchStrategy[TopKSpec]:
    def build(block_bits: int, share: float, width: float) -> TopKSpec:
        block = 1 << block_bits
        bits = 3 + round(width * (16 - block_bits - 3))
        return TopKSpec(block=block, k=max(1, round(share**3 * block)), value_bits=bits)

    unit = st.floats(0, 1)
    return st.sampled_from(SPECS) | st.builds(build, st.integers(4, 12), unit, unit)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    kinds: tuple[str, ...] = KINDS,
    blocks: int = 5,
    of: st.SearchStrategy[Any] | None = None,
) -> Case:
    spec = draw(specs() if of is None else of)
    sizes = st.sampled_from(edge_sizes(spec)) | st.integers(0, blocks * spec.block)
    return Case(
        spec=spec,
        kind=draw(st.sampled_from(kinds)),
        numel=draw(sizes),
        seed=draw(st.integers(0, 2**32 - 1)),
        memoryless=draw(st.booleans()),
    )


@functools.cache
def truth(*specs: Spec) -> tuple[tuple[Case, tuple[int, bytes, bytes]], ...]:
    """What the oracle makes of the corpus, before anything is planted."""
    return tuple((case, run(case, reference.encode)) for case in corpus(*specs))


def told_apart(right: Sequence[tuple[Case, Any]]) -> Case:
    """The first case of which the oracle, with a bug planted in it, makes something else than it did: what to run on
    kernels, which take longer. Raises StopIteration if there is none."""
    return next(case for case, want in right if run(case, reference.encode) != want)


def corpus(*specs: Spec) -> Iterator[Case]:
    """Every kind at every edge size of a few specs: what a planted bug is looked for in."""
    for spec in specs or SPECS[:1] + SPECS[2:3] + SPECS[6:7]:
        for kind in KINDS:
            for numel in edge_sizes(spec):
                yield Case(spec=spec, kind=kind, numel=numel, seed=1)


def run(case: Case, encoder: Encoder, *, in_place: bool = False) -> tuple[int, bytes, bytes]:
    """Flags, payload and new residual, as bytes; buffers start dirty, so nothing may be left unwritten."""
    grad, e_in = case.inputs()
    payload = np.full(case.spec.nbytes(case.numel), 0xA5, np.uint8)
    e_out = np.full(case.numel, -77.0, np.float32)
    if in_place and e_in is not None:
        e_out = e_in
    flags = encoder(case.spec, grad, e_in, e_out, payload, DIGEST)
    return flags, payload.tobytes(), e_out.tobytes()


def differs(case: Case, encoder: Encoder, other: Encoder = reference.encode) -> bool:
    return run(case, encoder) != run(case, other)


def encoded(case: Case) -> tuple[Floats, Bytes, Floats]:
    """The compensated gradient, the oracle's payload and new residual."""
    grad, e_in = case.inputs()
    payload = np.zeros(case.spec.nbytes(case.numel), np.uint8)
    e_out = np.zeros(case.numel, np.float32)
    reference.encode(case.spec, grad, e_in, e_out, payload, DIGEST)
    return reference.compensate(grad, e_in), payload, e_out


class Guarded:
    """Memory whose last byte is followed by a page without access: reading past the end ends the process."""

    def __init__(self, nbytes: int) -> None:
        page = mmap.PAGESIZE
        room = -(-max(nbytes, 1) // page) * page
        self._map = mmap.mmap(-1, room + page)
        whole = np.frombuffer(self._map, np.uint8)
        address = whole.ctypes.data + room
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address), page, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect of the guard page failed")
        self.bytes = whole[room - nbytes : room]

    def floats(self) -> Floats:
        return self.bytes.view(np.float32)


def guarded(source: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """A copy of ``source`` that ends at a guard page."""
    memory = Guarded(source.nbytes).bytes
    memory[:] = np.ascontiguousarray(source).view(np.uint8)
    return memory.view(source.dtype)


def in_thread(work: Callable[[], None]) -> None:
    """Thread-wide floating point modes end with their thread."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
