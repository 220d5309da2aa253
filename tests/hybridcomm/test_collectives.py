"""Every collective on the engine, bit for bit, on every topology: roots, sizes with 0 and 1, dtypes, inputs kept."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import hybridcomm
from hybridcomm.context import Context
from tests.engine_ranks import engine_contexts
from tests.exact import exact_ints, exact_sum
from tests.hybridcomm.strategies import NAMED
from tests.ranks import run_ranks

TOPOLOGIES = ("1x1", "1x4", "2x2", "4x1", "2+1", "3+2", "2+1+1", "interleaved")
SIZES = (0, 1, 17, 1001, 150_001)
COPIED = ("float32", "bfloat16", "uint8", "int64", "bool", "float8_e4m3fn", "complex64")


@pytest.fixture(scope="module", params=TOPOLOGIES)
def ranks(request: pytest.FixtureRequest) -> Iterator[list[Context]]:
    with engine_contexts(NAMED[request.param]) as contexts:
        yield contexts


@functools.lru_cache(maxsize=256)
def data(rank: int, numel: int, dtype: str = "float32", call: int = 0) -> torch.Tensor:
    """Bytes that differ by rank, place and call; as numbers they may be anything that a copy must keep.

    All ranks share it: collectives get a clone.
    """
    numbers = (torch.arange(numel) * 7 + 31 * rank + 5 * call).remainder(113)
    return numbers.to(getattr(torch, dtype))


def blank(numel: int, dtype: str = "float32") -> torch.Tensor:
    return (
        torch.full((numel,), 1, dtype=torch.float32).to(getattr(torch, dtype)) if numel else data(0, 0, dtype)
    )


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """The same bits."""
    return got.dtype == want.dtype and got.shape == want.shape and _bytes(got) == _bytes(want)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("dtype", COPIED)
def test_gather_and_scatter_with_every_root(ranks: list[Context], dtype: str) -> None:
    world = len(ranks)
    whole = dtype == "float32"  # the others: the first and the last root, fewer sizes

    def body(ctx: Context) -> None:
        for root in range(world) if whole else {0, world - 1}:
            for numel in SIZES if whole else (0, 1, 1001):
                mine = data(ctx.rank, numel, dtype, call=root).clone()
                out = [blank(numel, dtype) for _ in range(world)] if ctx.rank == root else None
                ctx.gather(mine, out, root)
                assert same(mine, data(ctx.rank, numel, dtype, call=root)), "the input was written"
                for rank, got in enumerate(out or []):
                    assert same(got, data(rank, numel, dtype, call=root)), (root, numel, rank)
                every = [data(rank, numel, dtype, call=9 + root).clone() for rank in range(world)]
                got = blank(numel, dtype)
                ctx.scatter(got, every if ctx.rank == root else None, root)
                assert same(got, data(ctx.rank, numel, dtype, call=9 + root)), (root, numel)

    run_ranks(body, ranks)


def uneven(world: int, seed: int) -> list[list[int]]:
    """How many rows go from i to j, zeros among them."""
    return np.random.default_rng(seed).choice([0, 1, 3, 500, 40_000], (world, world)).tolist()


@pytest.mark.parametrize("dtype", COPIED)
def test_all_to_all_in_all_its_forms(ranks: list[Context], dtype: str) -> None:
    world = len(ranks)

    def body(ctx: Context) -> None:
        me = ctx.rank
        for numel in SIZES if dtype == "float32" else (0, 1, 1001):
            sent = torch.cat([data(me, numel, dtype, call=j) for j in range(world)])
            out = blank(numel * world, dtype)
            ctx.all_to_all_single(out, sent)
            assert same(out, torch.cat([data(i, numel, dtype, call=me) for i in range(world)])), numel
        for seed in range(3 if dtype == "float32" else 1):
            rows = uneven(world, seed)
            sent = torch.cat([data(me, 2 * n, dtype, call=j) for j, n in enumerate(rows[me])]).view(-1, 2)
            theirs = [row[me] for row in rows]
            out = blank(2 * sum(theirs), dtype).view(-1, 2)
            ctx.all_to_all_single(out, sent, theirs, rows[me])
            want = torch.cat([data(i, 2 * n, dtype, call=me) for i, n in enumerate(theirs)]).view(-1, 2)
            assert same(out, want), rows
            given = [data(me, n, dtype, call=j).clone() for j, n in enumerate(rows[me])]
            taken = [blank(n, dtype) for n in theirs]
            ctx.all_to_all(taken, given)
            assert all(same(got, data(i, got.numel(), dtype, call=me)) for i, got in enumerate(taken)), rows
            assert all(same(t, data(me, t.numel(), dtype, call=j)) for j, t in enumerate(given)), "written"

    run_ranks(body, ranks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_all_gather_and_reduce_scatter_in_all_their_forms(ranks: list[Context], dtype: str) -> None:
    world = len(ranks)

    def body(ctx: Context) -> None:
        me = ctx.rank
        for sizes in ([0] * world, [1] * world, [1001] * world, [3 + 1000 * r for r in range(world)]):
            mine = data(me, sizes[me], dtype).clone()
            out = [blank(n, dtype) for n in sizes]
            ctx.all_gather(out, mine)
            assert all(same(got, data(r, got.numel(), dtype)) for r, got in enumerate(out)), sizes
            assert same(mine, data(me, sizes[me], dtype)), "the input was written"
            given = [value(me, n, world, dtype, call=r).clone() for r, n in enumerate(sizes)]
            got = blank(sizes[me], dtype)
            ctx.reduce_scatter(got, given)
            assert same(got, total(sizes[me], world, dtype, call=me)), sizes
            kept = [value(me, n, world, dtype, call=r) for r, n in enumerate(sizes)]
            assert all(same(left, right) for left, right in zip(given, kept, strict=True)), "written"
        whole = blank(1001 * world, dtype)
        whole[1001 * me : 1001 * (me + 1)] = data(me, 1001, dtype)
        ctx.all_gather_into_tensor(whole, whole[1001 * me : 1001 * (me + 1)])
        assert same(whole, torch.cat([data(r, 1001, dtype) for r in range(world)])), "in place"
        part = whole[1001 * me : 1001 * (me + 1)]
        whole.copy_(value(me, 1001 * world, world, dtype))
        ctx.reduce_scatter_tensor(part, whole)
        assert same(part, total(1001 * world, world, dtype)[1001 * me : 1001 * (me + 1)]), "in place"

    run_ranks(body, ranks)


@functools.lru_cache(maxsize=256)
def value(rank: int, numel: int, world: int, dtype: str = "float32", call: int = 0) -> torch.Tensor:
    numbers = exact_ints(rank=rank, numel=numel, world=world, dtype=dtype, call=call)
    return torch.from_numpy(numbers).to(getattr(torch, dtype))


@functools.lru_cache(maxsize=64)
def total(numel: int, world: int, dtype: str = "float32", call: int = 0) -> torch.Tensor:
    return torch.from_numpy(exact_sum(numel=numel, world=world, dtype=dtype, call=call)).to(
        getattr(torch, dtype)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "int32", "int64"])
def test_reduce_to_every_root_leaves_the_others_alone(ranks: list[Context], dtype: str) -> None:
    world = len(ranks)
    whole = dtype == "float32"

    def body(ctx: Context) -> None:
        for root in range(world) if whole else {0, world - 1}:
            for numel in SIZES if whole else (0, 1, 40_001):
                tensor = value(ctx.rank, numel, world, dtype, call=root).clone()
                ctx.reduce(tensor, root)
                mine = value(ctx.rank, numel, world, dtype, call=root)
                want = total(numel, world, dtype, call=root) if ctx.rank == root else mine
                assert same(tensor, want), (root, numel)

    run_ranks(body, ranks)


REDUCED: dict[str, tuple[Any, str, Any]] = {
    "avg": ("avg", "float32", lambda parts: np.sum(parts, axis=0) / len(parts)),
    "min": ("min", "int16", lambda parts: np.min(parts, axis=0)),
    "max": ("max", "float64", lambda parts: np.max(parts, axis=0)),
    "product": ("product", "int64", lambda parts: np.prod(parts, axis=0)),
    "band": ("band", "int32", np.bitwise_and.reduce),
    "bor": ("bor", "uint8", np.bitwise_or.reduce),
    "bxor": ("bxor", "int8", np.bitwise_xor.reduce),
    "any": ("sum", "bool", np.logical_or.reduce),
    "premul": (hybridcomm.premul_sum(3.0), "float32", lambda parts: 3 * np.sum(parts, axis=0)),
    "complex": ("sum", "complex64", lambda parts: np.sum(parts, axis=0)),
}


@pytest.mark.parametrize("what", REDUCED)
def test_reduce_and_reduce_scatter_take_every_op(ranks: list[Context], what: str) -> None:
    op, dtype, oracle = REDUCED[what]
    world = len(ranks)

    @functools.cache
    def part(rank: int, numel: int) -> np.ndarray[Any, Any]:
        numbers = np.random.default_rng([rank, numel]).integers(1, 5, numel)
        numbers = numbers * world if what == "avg" else numbers % 2 if dtype == "bool" else numbers
        return numbers.astype(dtype)

    sums = {n: oracle([part(r, n * world) for r in range(world)]).astype(dtype) for n in (0, 1, 30_001)}

    def body(ctx: Context) -> None:
        for numel, want in sums.items():
            for root in (0, world - 1):
                tensor = part(ctx.rank, numel * world).copy()
                ctx.reduce(tensor, root, op=op)
                assert (tensor == (want if ctx.rank == root else part(ctx.rank, numel * world))).all()
            whole, out = part(ctx.rank, numel * world).copy(), np.zeros(numel, dtype)
            ctx.reduce_scatter_tensor(out, whole, op=op)
            assert (out == want[ctx.rank * numel : (ctx.rank + 1) * numel]).all()
            assert (whole == part(ctx.rank, numel * world)).all(), "the input was written"

    run_ranks(body, ranks)


def test_shapes_are_of_no_account_and_zero_dimensions_count_as_one_element(ranks: list[Context]) -> None:
    world = len(ranks)

    def body(ctx: Context) -> None:
        scalar = torch.tensor(float(ctx.rank + 1))
        ctx.reduce(scalar, world - 1)
        assert scalar.item() == (sum(range(1, world + 1)) if ctx.rank == world - 1 else ctx.rank + 1)
        out = torch.zeros(world)
        ctx.all_gather_into_tensor(out, torch.tensor(float(ctx.rank)))
        assert out.tolist() == list(range(world))
        got = [torch.tensor(-1.0) for _ in range(world)]
        ctx.all_gather(got, torch.tensor(float(ctx.rank)))
        assert [t.item() for t in got] == list(range(world))
        own = np.array(float(ctx.rank))
        into = [np.array(-1.0) for _ in range(world)] if ctx.rank == 0 else None
        ctx.gather(own, into)
        assert [float(each) for each in into or range(world)] == list(range(world))
        summed = torch.tensor(0.0)
        ctx.reduce_scatter_tensor(summed, torch.arange(float(world)))
        assert summed.item() == world * ctx.rank
        cube = torch.full((2, world, 3), float(ctx.rank))
        ctx.broadcast(cube, world - 1)
        assert (cube == world - 1).all()

    run_ranks(body, ranks)


def test_monitored_barrier_lets_nobody_out_before_all_are_in(ranks: list[Context]) -> None:
    import time

    entered, left = [0.0] * len(ranks), [0.0] * len(ranks)

    def body(ctx: Context) -> None:
        time.sleep(0.03 * ctx.rank)
        entered[ctx.rank] = time.monotonic()
        ctx.monitored_barrier(timeout=20)
        left[ctx.rank] = time.monotonic()

    run_ranks(body, ranks)
    assert max(entered) <= min(left)
