"""Dense collectives on the real engine: equality with exact sums, for every topology, dtype, size and array type."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from hybridcomm.topology import Topology
from tests.engine_ranks import engine_contexts
from tests.exact import exact_ints, exact_sum
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks

SIZES = (0, 1, 15, 16, 17, 97, 4099, 16_384, 131_072, 131_073, 300_007)
"""Empty, single, around alignment, primes, around the smallest and the largest chunk of fp32."""

FLOATS = ("float32", "bfloat16", "float16", "float64")
INTEGERS = ("int64", "int32")


@pytest.fixture(params=list(NAMED), scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    with engine_contexts(NAMED[request.param]) as contexts:
        yield contexts


def tensor(values: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    return torch.from_numpy(values).to(getattr(torch, dtype))


def exact(rank: int, world: int, numel: int, dtype: str, call: int = 0) -> torch.Tensor:
    return tensor(exact_ints(rank=rank, numel=numel, world=world, call=call, dtype=dtype), dtype)


@functools.lru_cache(maxsize=256)
def total(world: int, numel: int, dtype: str, call: int = 0) -> torch.Tensor:
    """The expected sum; shared by the ranks' threads, so never written."""
    return tensor(exact_sum(numel=numel, world=world, call=call, dtype=dtype), dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_allreduce_is_the_sum_bit_for_bit(ranks: list[Any], dtype: str) -> None:
    world = len(ranks)
    for call, numel in enumerate(SIZES):
        total(world, numel, dtype, call)

    def body(ctx: Any) -> None:
        for call, numel in enumerate(SIZES):
            value = exact(ctx.rank, world, numel, dtype, call)
            assert ctx.allreduce(value) is None
            assert same_bits(value, total(world, numel, dtype, call)), (ctx.rank, numel)

    run_ranks(body, ranks)


@pytest.mark.parametrize("dtype", FLOATS)
def test_mean_divides_the_sum_by_the_world_size(ranks: list[Any], dtype: str) -> None:
    """Multiples of the world size make the mean exact, so equality again."""
    world = len(ranks)

    def body(ctx: Any) -> None:
        for numel in (1, 97, 4099):
            small = exact_ints(rank=ctx.rank, numel=numel, world=world * world, dtype=dtype)
            value = tensor(small * world, dtype)
            ctx.allreduce(value, op="mean")
            parts = [
                exact_ints(rank=rank, numel=numel, world=world * world, dtype=dtype) for rank in range(world)
            ]
            assert same_bits(value, tensor(np.sum(parts, axis=0), dtype)), (ctx.rank, numel)

    run_ranks(body, ranks)


def test_several_mebibytes(ranks: list[Any]) -> None:
    world, numel = len(ranks), (5 << 18) + 7
    want = total(world, numel, "float32")

    def body(ctx: Any) -> None:
        value = exact(ctx.rank, world, numel, "float32")
        ctx.allreduce(value)
        assert same_bits(value, want)

    run_ranks(body, ranks)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32", "float64"])
def test_numpy_arrays_of_any_shape(ranks: list[Any], dtype: str) -> None:
    world = len(ranks)

    def body(ctx: Any) -> None:
        value = (
            exact_ints(rank=ctx.rank, numel=3 * 5 * 7, world=world, dtype=dtype)
            .astype(dtype)
            .reshape(3, 5, 7)
        )
        ctx.allreduce(value)
        want = exact_sum(numel=3 * 5 * 7, world=world, dtype=dtype).astype(dtype)
        assert value.tobytes() == want.tobytes()

    run_ranks(body, ranks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "int64"])
def test_broadcast_from_every_root(ranks: list[Any], dtype: str) -> None:
    world = len(ranks)

    def body(ctx: Any) -> None:
        for root in range(world):
            for numel in (0, 1, 17, 300_001):
                value = (
                    (torch.arange(numel) * 7 + 31 * ctx.rank + root).remainder(97).to(getattr(torch, dtype))
                )
                want = (torch.arange(numel) * 7 + 31 * root + root).remainder(97).to(getattr(torch, dtype))
                ctx.broadcast(value, root)
                assert same_bits(value, want), (ctx.rank, root, numel)

    run_ranks(body, ranks)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64"])
def test_all_gather_keeps_rank_order(ranks: list[Any], dtype: str) -> None:
    world = len(ranks)

    def part(rank: int, numel: int) -> torch.Tensor:
        return (torch.arange(numel) * 3 + 41 * rank).remainder(127).to(getattr(torch, dtype))

    def body(ctx: Any) -> None:
        for numel in (0, 1, 16, 1001, 150_001):
            out = torch.full((world * numel,), 99, dtype=getattr(torch, dtype))
            mine = part(ctx.rank, numel)
            ctx.all_gather(out, mine)
            assert same_bits(out, torch.cat([part(rank, numel) for rank in range(world)]))
            assert same_bits(mine, part(ctx.rank, numel)), "the input was written"

    run_ranks(body, ranks)


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_reduce_scatter_gives_each_rank_its_part(ranks: list[Any], op: str) -> None:
    world = len(ranks)
    factor = world if op == "mean" else 1

    def body(ctx: Any) -> None:
        for numel in (0, 1, 16, 1001, 150_001):
            whole = tensor(
                factor * exact_ints(rank=ctx.rank, numel=world * numel, world=world * factor), "float32"
            )
            before = whole.clone()
            out = torch.full((numel,), float("nan"))
            ctx.reduce_scatter(out, whole, op=op)
            parts = [
                exact_ints(rank=rank, numel=world * numel, world=world * factor) for rank in range(world)
            ]
            want = tensor(np.sum(parts, axis=0), "float32")[ctx.rank * numel : (ctx.rank + 1) * numel]
            assert same_bits(out, want), (ctx.rank, numel)
            assert same_bits(whole, before), "the input was written"

    run_ranks(body, ranks)


def test_bfloat16_is_accumulated_in_float32() -> None:
    """256 + 1 + 1 + 1: in bf16 every single + 1 is rounded away; in fp32 the sum 259 is rounded once, to 260."""
    start = [256.0, 1.0, 1.0, 1.0]
    in_bf16 = torch.tensor(start[0], dtype=torch.bfloat16)
    for value in start[1:]:
        in_bf16 = in_bf16 + torch.tensor(value, dtype=torch.bfloat16)
    assert in_bf16.item() == 256.0, "the case would not tell the two apart"

    def body(ctx: Any) -> float:
        value = torch.full((100,), start[ctx.rank], dtype=torch.bfloat16)
        ctx.allreduce(value)
        assert (value == value[0]).all()
        return float(value[0])

    with engine_contexts(Topology.virtual(1, 4)) as ranks:
        assert run_ranks(body, ranks) == [260.0] * 4


def test_swapped_regions_are_noticed() -> None:
    """Negative control: the crafted inputs tell a result whose halves are swapped, or that lacks a rank."""
    good = total(4, 64, "float32")
    assert not same_bits(torch.cat([good[32:], good[:32]]), good)
    lacking = good - exact(3, 4, 64, "float32")
    assert not same_bits(lacking, good)
