"""Compressed all-reduces for the soak, each codec on inputs of which it loses nothing, or loses what is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hybridcomm import CustomCompressor, Residual
from hybridcomm.topology import Topology
from tests.exact import exact_ints
from tests.hybridcomm.compressors import Half
from tests.soak_operations import Draw, Kind, Pending

__all__ = ["CODECS", "COMPRESSED"]

Numbers = np.ndarray[Any, Any]
Check = Callable[[Numbers, Numbers, int], bool]
"""(result, exact sum, nodes)."""


def integers(rank: int, topology: Topology, draw: Draw) -> Numbers:
    """Sums below 2^7: whole in 8 bits, and so in every wider format."""
    return exact_ints(
        rank=rank, numel=draw.numel, world=topology.world_size, call=draw.number, dtype="bfloat16"
    )


def ternary(rank: int, topology: Topology, draw: Draw) -> Numbers:
    """-1, 0 or 1: sums of up to 7 ranks have 3 digits."""
    return np.sign(integers(rank, topology, draw)) * (integers(rank, topology, draw) % 3 > 0)


def signs(rank: int, topology: Topology, draw: Draw) -> Numbers:
    """Of one rank of each node, the same: sums of a node have one magnitude, a power of two."""
    alone = rank == topology.nodes[topology.node_of(rank)][0]
    return np.where(integers(0, topology, draw) < 0, -1, 1) * alone


def halves(rank: int, topology: Topology, draw: Draw) -> Numbers:
    """Of elements j and j + 32 of each block of 64 the second is zero."""
    return integers(rank, topology, draw) * (np.arange(draw.numel) % 64 < 32)


def constant(rank: int, topology: Topology, draw: Draw) -> Numbers:
    """A matrix of rank 2 at most, its last row being cut off: of 16 random directions some do not miss it."""
    return np.full(draw.numel, rank + 1)


def equal(got: Numbers, want: Numbers, _: int) -> bool:
    return np.array_equal(got, want)


def close(got: Numbers, want: Numbers, _: int) -> bool:
    """Up to the roundings of two products."""
    return np.allclose(got, want, rtol=1e-3, atol=0)


def one_of_two(got: Numbers, want: Numbers, nodes: int) -> bool:
    """Each node sends one of two equal neighbours: together they hold the sum once; within a node nothing is lost."""
    pairs = got.size // 2 * 2
    return equal(got[:pairs].reshape(-1, 2).sum(1), want[:pairs:2] * (1 if nodes > 1 else 2), nodes)


@dataclass(frozen=True, kw_only=True)
class Codec:
    """What is compressed by which codec, and when the result is right."""

    compress: str | CustomCompressor
    inputs: Callable[[int, Topology, Draw], Numbers] = integers
    check: Check = equal


CODECS = (
    Codec(compress="topk:1/b64"),
    Codec(compress="topk:1+int8"),
    Codec(compress="topk:1+sign", inputs=signs),
    Codec(compress="gtopk:1/b64"),
    Codec(compress="gtop1:0.5", inputs=halves),
    Codec(compress="randk:0.5", inputs=constant, check=one_of_two),
    Codec(compress="fp16"),
    Codec(compress="bf16"),
    Codec(compress="fp8/g64", inputs=ternary),
    Codec(compress="fp8:e5m2", inputs=ternary),
    Codec(compress="int8/g64"),
    Codec(compress="int4", inputs=ternary),
    Codec(compress="sign1/g64", inputs=signs),
    Codec(compress="powersgd:16", inputs=constant, check=close),
    Codec(compress=Half()),
)


def allreduce_compressed(ctx: Any, draw: Draw) -> Pending:
    codec = draw.choose(CODECS, 1)
    given = codec.inputs(ctx.rank, ctx.topology, draw)
    value = torch.from_numpy(given).to(torch.float32, copy=True)
    residual = draw.choose((Residual(), None), 2)
    work = ctx.allreduce(value, compress=codec.compress, residual=residual, async_op=draw.async_op)

    def check() -> bool:
        want = sum(codec.inputs(rank, ctx.topology, draw) for rank in range(ctx.world_size))
        assert codec.check(value.numpy(), want, len(ctx.topology.nodes)), codec.compress
        return True

    return Pending(work=work, check=check)


COMPRESSED = (Kind(name="allreduce, compressed", start=allreduce_compressed, weight=4),)
