"""Triton's record codecs behind the oracle's interface, in the interpreter, and what decoders are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from hybridcomm.kernels import Spec, reference
from hybridcomm.kernels.device_codec import jit_codec
from tests.kernels import cases
from tests.kernels.cases import DIGEST, Bytes, Case, Floats
from tests.kernels.ptx_sparse import narrowed, widened

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tensor(values: Floats, kind: str) -> torch.Tensor:
    made = narrowed(values, kind)
    return torch.from_numpy(made.view(np.int16) if kind == "bf16" else made.copy()).view(_TYPES[kind])


def _array(values: torch.Tensor, kind: str) -> Floats:
    raw = values.view(torch.int16).numpy().view(np.uint16) if kind == "bf16" else values.numpy()
    return widened(raw, kind)


Encoder = Callable[[Spec, Floats, Floats | None, Floats, Bytes, int], int]


def oracle(grad: str = "fp32", rest: str = "fp32", decay: float = 1.0) -> Encoder:
    """The oracle's encoder of inputs in these types; e_out is given back widened."""

    def encode(
        spec: Spec, given: Floats, e_in: Floats | None, e_out: Floats, payload: Bytes, digest: int
    ) -> int:
        given = widened(narrowed(given, grad), grad)
        source = None if e_in is None else widened(narrowed(e_in, rest), rest)
        flags = reference.encode(spec, given, source, e_out, payload, digest, decay=decay)
        e_out[:] = widened(narrowed(e_out, rest), rest)
        return flags

    return encode


def encoder(grad: str = "fp32", rest: str = "fp32", decay: float = 1.0, **options: int) -> Encoder:
    """The kernels' likewise; ``options``: what else they are given."""

    def encode(
        spec: Spec, given: Floats, e_in: Floats | None, e_out: Floats, payload: Bytes, digest: int
    ) -> int:
        made = torch.zeros(payload.size, dtype=torch.uint8) + 0xA5
        source = None if e_in is None else tensor(e_in, rest)
        left = source if source is not None and e_out is e_in else tensor(e_out, rest)
        jit_codec(spec).encode(tensor(given, grad), source, left, made, digest, decay=decay, **options)
        payload[:], e_out[:] = made.numpy(), _array(left, rest)
        return int(payload[40])

    return encode


def matches_decoding(first: Case, data: st.DataObject) -> bool:
    """Several payloads into what is there, or into zeros."""
    kinds = data.draw(st.lists(st.sampled_from(cases.KINDS), max_size=2))
    weight = data.draw(st.sampled_from([1.0, 0.25, float(np.float32(1 / 3)), -1.0]))
    clear = data.draw(st.booleans())
    others = [Case(spec=first.spec, kind=kind, numel=first.numel, seed=i) for i, kind in enumerate(kinds)]
    payloads = np.stack([cases.encoded(case)[1] for case in [first, *others]])
    want = cases.values("normal", first.numel, 99)[0]
    want[::3] = -0.0
    got = torch.from_numpy(want.copy())
    if clear:
        want[:] = 0
    reference.decode_add(first.spec, list(payloads), want, weight, DIGEST)
    jit_codec(first.spec).decode_add(torch.from_numpy(payloads), got, weight, DIGEST, clear=clear)
    return bool(got.numpy().tobytes() == want.tobytes())


def matches_reencoding(spec: Any, numel: int, kinds: tuple[str, ...], rest: str = "fp32") -> bool:
    """The sum of payloads, encoded anew, against the oracle's two steps."""
    given = [
        cases.encoded(Case(spec=spec, kind=kind, numel=numel, seed=i))[1] for i, kind in enumerate(kinds)
    ]
    e_in = widened(narrowed(cases.values("normal", numel, 5)[1], rest), rest)
    total, want_rest = np.zeros(numel, np.float32), np.zeros(numel, np.float32)
    want = np.zeros(spec.nbytes(numel), np.uint8)
    reference.decode_add(spec, given, total, 0.25, DIGEST)
    reference.encode(spec, total, e_in, want_rest, want, DIGEST, decay=0.9)
    got, left = torch.zeros(want.size, dtype=torch.uint8) + 0xA5, tensor(want_rest * 0 - 77, rest)
    payloads = torch.from_numpy(np.stack(given))
    again = jit_codec(spec).reencode
    assert again is not None
    again(payloads, numel, tensor(e_in, rest), left, got, DIGEST, weight=0.25, decay=0.9)
    right = widened(narrowed(want_rest, rest), rest).tobytes()
    return bool(got.numpy().tobytes() == want.tobytes() and _array(left, rest).tobytes() == right)
