"""The sparse and low-rank codecs under test: specs, sizes around their edges, and what one pass of each gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from hypothesis import strategies as st

from hybridcomm.kernels import Spec, host, reference
from hybridcomm.kernels.spec import parse
from hybridcomm.kernels.vectors import NONFINITE
from tests.kernels import cases
from tests.kernels.cases import DIGEST, Bytes, Case, Floats

SEED = 0x0123456789ABCDEF
TEXTS = (
    "topk:0.01+int8",
    "topk:0.2+int8/b16",
    "topk:0.01+sign",
    "topk:0.1+sign/b64",
    "topk:1+sign/b16",
    "gtop1:0.01",
    "gtop1:0.5/k16",
    "gtop1:0.004/v4",
    "gtop1:0.07/k48",
    "gtopk:0.01",
    "gtopk:0.3/b64",
    "gtopk:0.05/b16/v4",
    "gtopk:1/b32",
    "gtopk:0.01/b4096",
    "powersgd:1/b16",
    "powersgd:3/b32",
    "powersgd:16/b64",
    "powersgd:2",
    "randk:0.01",
    "randk:0.5",
    "randk:0.004+unbiased",
    "randk:0.1+unbiased",
)
SPECS = {text: parse(text) for text in TEXTS}
ISAS = host.available_isas()
FINITE = tuple(kind for kind in cases.KINDS if kind not in NONFINITE)


def sizes(spec: Spec) -> tuple[int, ...]:
    """Empty, one, around half a block, one block, two, and several with a tail."""
    block = spec.block
    around = {
        0,
        1,
        15,
        16,
        17,
        block // 2,
        block - 1,
        block,
        block + 1,
        2 * block,
        3 * block + block // 2 + 1,
    }
    return tuple(sorted(around))


def case(spec: Spec, kind: str, numel: int, *, seed: int = 7, memoryless: bool = False) -> Case:
    return Case(spec=spec, kind=kind, numel=numel, seed=seed, memoryless=memoryless)  # type: ignore[arg-type]


@st.composite
def any_case(
    draw: st.DrawFn, *, kinds: tuple[str, ...] = cases.KINDS, texts: tuple[str, ...] = TEXTS
) -> Case:
    spec = SPECS[draw(st.sampled_from(texts))]
    numel = draw(st.sampled_from(sizes(spec)) | st.integers(0, 3 * min(spec.block, 2048)))
    seed = draw(st.integers(0, 2**32 - 1))
    return case(spec, draw(st.sampled_from(kinds)), numel, seed=seed, memoryless=draw(st.booleans()))


def encoder(isa: str | None = None, *, seed: int = SEED, decay: float = 1.0) -> Callable[..., int]:
    """The oracle, or C++ on one instruction set, with a seed."""
    if isa is None:
        return partial(reference.encode, seed=seed, decay=decay)
    return partial(host.encode, isa=isa, seed=seed, decay=decay)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One encode and decode: fp64 arrays but for the payload."""

    acc: Floats
    payload: Bytes
    rest: Floats
    decoded: Floats


def compress(of: Case, *, seed: int = SEED, values: Floats | None = None) -> Pass:
    """By the fastest C++ kernels; ``values`` instead of the case's own, memoryless."""
    grad, e_in = of.inputs() if values is None else (values, None)
    payload, rest = np.zeros(of.spec.nbytes(grad.size), np.uint8), np.zeros(grad.size, np.float32)
    assert host.encode(of.spec, grad, e_in, rest, payload, DIGEST, seed=seed) == 0
    decoded = np.zeros(grad.size, np.float32)
    host.decode_add(of.spec, [payload], decoded, 1.0, DIGEST)
    return Pass(acc=reference.compensate(grad, e_in), payload=payload, rest=rest, decoded=decoded)
