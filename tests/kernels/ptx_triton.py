"""Triton's kernels as they are shipped, behind their own host code, as tests call them; the oracle likewise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hybridcomm.kernels import parse
from hybridcomm.kernels.cubins.launcher import Run, family_of
from hybridcomm.kernels.device import DeviceKernel
from hybridcomm.kernels.triton import codes, gtop1, launch, launch_records, randk, topk
from hybridcomm.kernels.triton.family import Family
from hybridcomm.selftest.kernels import oracle
from tests.kernels import cases
from tests.kernels.cases import DIGEST, Case, Floats
from tests.kernels.ptx_sparse import tensor
from tests.kernels.sparse_cases import SEED

__all__ = ["CODECS", "Codec", "encoded", "floats", "inputs", "payloads_of", "reencoded", "wanted"]


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A spec's text, its host code, and what is shipped of it."""

    text: str
    host: Any
    functions: Family
    kernels: tuple[DeviceKernel, ...]

    @property
    def spec(self) -> Any:
        return parse(self.text)

    @property
    def drawn(self) -> dict[str, int]:
        """What encoders are given beside the rest."""
        return {"seed": SEED} if self.spec.seeded else {}

    def on(self, run: Run) -> Family:
        """What is shipped, launched by ``run``."""
        return family_of(self.functions, self.kernels, run, otherwise=False)

    def __str__(self) -> str:
        return self.text


CODECS = (
    *(
        Codec(text=text, host=launch, functions=codes.FAMILY, kernels=codes.KERNELS)
        for text in ("int8", "int4", "fp8", "sign1", "fp16", "bf16")
    ),
    Codec(text="gtop1:0.01", host=launch_records, functions=gtop1.FAMILY, kernels=gtop1.KERNELS),
    Codec(text="randk:0.01", host=launch_records, functions=randk.FAMILY, kernels=randk.KERNELS),
    *(
        Codec(
            text=text,
            host=launch_records,
            functions=topk.FAMILY,
            kernels=tuple(kernel for kernel in topk.KERNELS if kernel.codec == str(parse(text))),
        )
        for text in ("topk:0.01+sign", "topk:0.01+int8")
    ),
)


def floats(made: torch.Tensor) -> Floats:
    return made.float().numpy()


def inputs(codec: Codec, kind: str, numel: int, types: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    grad, e_in = Case(spec=codec.spec, kind=kind, numel=numel, seed=7).inputs()
    assert e_in is not None
    return tensor(grad, types[0]), tensor(e_in, types[1])


def encoded(codec: Codec, functions: Family, grad: torch.Tensor, e_in: torch.Tensor) -> tuple[bytes, bytes]:
    payload = torch.full((codec.spec.nbytes(grad.numel()),), 0xA5, dtype=torch.uint8)
    e_out = torch.full_like(e_in, 77.0)
    codec.host.encode(functions, codec.spec, grad, e_in, e_out, payload, DIGEST, **codec.drawn)
    return payload.numpy().tobytes(), floats(e_out).tobytes()


def wanted(codec: Codec, grad: torch.Tensor, e_in: torch.Tensor) -> tuple[bytes, bytes]:
    return oracle(codec.spec, grad, e_in, **codec.drawn)


def payloads_of(codec: Codec, kinds: tuple[str, ...], numel: int) -> torch.Tensor:
    made = [
        cases.encoded(Case(spec=codec.spec, kind=kind, numel=numel, seed=i))[1]
        for i, kind in enumerate(kinds)
    ]
    return torch.from_numpy(np.stack(made))


def reencoded(
    codec: Codec, functions: Family, payloads: torch.Tensor, e_in: torch.Tensor
) -> tuple[bytes, bytes]:
    payload = torch.full((codec.spec.nbytes(e_in.numel()),), 0xA5, dtype=torch.uint8)
    e_out = torch.full_like(e_in, 77.0)
    codec.host.reencode(
        functions,
        codec.spec,
        payloads,
        e_in.numel(),
        e_in,
        e_out,
        payload,
        DIGEST,
        weight=0.25,
        **codec.drawn,
    )
    return payload.numpy().tobytes(), floats(e_out).tobytes()
