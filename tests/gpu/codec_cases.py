"""Every shipped kernel behind its host code, on every kind of values, against the oracle: whoever launches them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hybridcomm.kernels import parse, reference
from hybridcomm.kernels.cubins.launcher import Run
from hybridcomm.kernels.cuda import gtopk, powersgd, topk
from hybridcomm.kernels.device_codec import device_codec
from hybridcomm.selftest.kernels import oracle
from tests.kernels import cases
from tests.kernels.cases import DIGEST, Case
from tests.kernels.ptx_sparse import tensor
from tests.kernels.sparse_cases import SEED

__all__ = ["SPECS", "TYPES", "decoded", "encoded", "payloads_of", "reencoded", "sizes", "types_of"]

SPECS = (
    *("int8", "int4", "fp8", "sign1", "fp16", "bf16", "gtop1:0.01", "randk:0.01"),
    *("topk:0.01+sign", "topk:0.01+int8", "topk:0.01", "gtopk:0.01"),
    *("powersgd:1", "powersgd:2", "powersgd:4"),
)
TYPES = (
    *(("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "bf16")),
    *(("fp32", "bf16"), ("fp16", "bf16")),
)
"""Of gradient and residual; the last two are built of the kernels in CUDA C++ alone."""


def types_of(spec: Any) -> tuple[tuple[str, str], ...]:
    return TYPES if spec in (topk.SPEC, gtopk.SPEC, *powersgd.SPECS) else TYPES[:4]


def sizes(spec: Any) -> tuple[int, ...]:
    """Whole programs, some and a tail, a tail alone; shipped are multiples of 16."""
    if spec in powersgd.SPECS:  # a program of `left`, which has the most, and a last row that is not whole
        return 1 << 15, (1 << 14) + 1040, 48
    size = 8192 if spec == gtopk.SPEC else max(spec.block, 2048)
    return 2 * size, size + size // 2 // 16 * 16 + 16, 48


def _drawn(spec: Any) -> dict[str, int]:
    return {"seed": SEED} if spec.seeded else {}


def _dirty(numel: int, kind: str) -> torch.Tensor:
    return tensor(np.full(numel, 77, np.float32), kind)


def encoded(
    run: Run, spec: Any, kind: str, numel: int, types: tuple[str, str]
) -> Iterator[tuple[bytes, bytes]]:
    """Payload and residual, as launched and as wanted."""
    values, e_in = Case(spec=spec, kind=kind, numel=numel, seed=7).inputs()
    assert e_in is not None
    grad, source = tensor(values, types[0]), tensor(e_in, types[1])
    payload = torch.full((spec.nbytes(numel),), 0xA5, dtype=torch.uint8)
    rest = _dirty(numel, types[1])
    device_codec(spec, run, jit=False).encode(grad, source, rest, payload, DIGEST, **_drawn(spec))
    yield payload.numpy().tobytes(), rest.float().numpy().tobytes()
    yield oracle(spec, grad, source, **_drawn(spec))


def payloads_of(spec: Any, kinds: Sequence[str], numel: int) -> torch.Tensor:
    made = [cases.encoded(Case(spec=spec, kind=kind, numel=numel, seed=i))[1] for i, kind in enumerate(kinds)]
    return torch.from_numpy(np.stack(made))


def decoded(
    run: Run, spec: Any, kinds: Sequence[str], numel: int, weight: float, *, clear: bool = False
) -> Iterator[bytes]:
    """What stands in a region then, as launched and as wanted."""
    payloads, got = payloads_of(spec, kinds, numel), cases.values("normal", numel, 99)[0]
    got[::3] = -0.0
    want = np.zeros(numel, np.float32) if clear else got.copy()
    out, options = torch.from_numpy(got), {"clear": True} if clear else {}
    device_codec(spec, run, jit=False).decode_add(payloads, out, weight, DIGEST, **options)
    yield got.tobytes()
    reference.decode_add(spec, list(payloads.numpy()), want, weight, DIGEST)
    yield want.tobytes()


def reencoded(
    run: Run, spec: Any, kinds: Sequence[str], numel: int, rest: str
) -> Iterator[tuple[bytes, bytes]]:
    """Payload and residual of the sum of payloads, as launched and as wanted."""
    payloads, source = payloads_of(spec, kinds, numel), tensor(cases.values("normal", numel, 5)[0], rest)
    payload, left = torch.full((spec.nbytes(numel),), 0xA5, dtype=torch.uint8), _dirty(numel, rest)
    again = device_codec(spec, run, jit=False).reencode
    assert again is not None
    again(payloads, numel, source, left, payload, DIGEST, weight=0.25, **_drawn(spec))
    yield payload.numpy().tobytes(), left.float().numpy().tobytes()
    total = np.zeros(numel, np.float32)
    reference.decode_add(spec, list(payloads.numpy()), total, 0.25, DIGEST)
    yield oracle(spec, torch.from_numpy(total), source, **_drawn(spec))


def specs() -> Iterator[Any]:
    """All codecs with device kernels."""
    for text in SPECS:
        yield parse(text)
