"""The collectives that the soak draws from, each with its exact result: add yours to `COLLECTIVES`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.exact import exact_ints

__all__ = [
    "COLLECTIVES",
    "DTYPES",
    "Draw",
    "Kind",
    "Pending",
    "forget_inputs",
    "holds",
    "numbers",
    "own_numbers",
    "reduced_numbers",
    "tensor_of",
]

DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32")
REDUCTIONS = {"sum": np.add, "min": np.minimum, "max": np.maximum}


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What all ranks know of an operation: they draw it from the same seed."""

    number: int
    numel: int
    pick: int
    """A large random number: choose dtype, op and root from it."""
    async_op: bool

    def choose(self, options: tuple[Any, ...], salt: int = 0) -> Any:
        return options[(self.pick >> (8 * salt)) % len(options)]


@dataclass(kw_only=True)
class Pending:
    """An operation that was started: wait for ``work``, if there is one, then ``check()`` whether all is right."""

    work: Any
    check: Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of operation; ``start(context, draw)`` runs on every rank. Drawn ``weight`` times as often as 1."""

    name: str
    start: Callable[[Any, Draw], Pending]
    weight: int = 1


@functools.lru_cache(maxsize=32)
def numbers(rank: int, world: int, numel: int, number: int, dtype: str) -> np.ndarray[Any, Any]:
    """Shared by the ranks' threads, so never written."""
    return exact_ints(rank=rank, numel=numel, world=world, call=number, dtype=dtype)


@functools.lru_cache(maxsize=8)
def reduced_numbers(world: int, numel: int, number: int, dtype: str, op: str) -> np.ndarray[Any, Any]:
    parts = [numbers(rank, world, numel, number, dtype) for rank in range(world)]
    return functools.reduce(REDUCTIONS[op], parts)


def forget_inputs() -> None:
    """Frees what the ranks share, so that it is not taken for a leak."""
    numbers.cache_clear()
    reduced_numbers.cache_clear()


def tensor_of(values: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    return torch.from_numpy(values).to(getattr(torch, dtype), copy=True)


def holds(tensor: torch.Tensor, values: np.ndarray[Any, Any], dtype: str) -> bool:
    return torch.equal(tensor, tensor_of(values, dtype))


def own_numbers(ctx: Any, draw: Draw, dtype: str, *, numel: int | None = None) -> np.ndarray[Any, Any]:
    count = draw.numel if numel is None else numel
    return numbers(ctx.rank, ctx.world_size, count, draw.number, dtype)


def allreduce(ctx: Any, draw: Draw) -> Pending:
    dtype, op = draw.choose(DTYPES), draw.choose(tuple(REDUCTIONS), 1)
    value = tensor_of(own_numbers(ctx, draw, dtype), dtype)
    work = ctx.allreduce(value, op=op, async_op=draw.async_op)
    return Pending(
        work=work,
        check=lambda: holds(
            value, reduced_numbers(ctx.world_size, draw.numel, draw.number, dtype, op), dtype
        ),
    )


def allreduce_shared(ctx: Any, draw: Draw) -> Pending:
    """On a tensor in shared memory, which comes and goes."""
    value = ctx.empty(draw.numel, dtype=torch.float32)
    value.copy_(tensor_of(own_numbers(ctx, draw, "float32"), "float32"))
    work = ctx.allreduce(value, async_op=draw.async_op)
    return Pending(
        work=work,
        check=lambda: holds(
            value, reduced_numbers(ctx.world_size, draw.numel, draw.number, "float32", "sum"), "float32"
        ),
    )


def broadcast(ctx: Any, draw: Draw) -> Pending:
    dtype, root = draw.choose(DTYPES), draw.choose(tuple(range(ctx.world_size)), 1)
    value = tensor_of(own_numbers(ctx, draw, dtype), dtype)
    work = ctx.broadcast(value, root, async_op=draw.async_op)
    return Pending(
        work=work,
        check=lambda: holds(value, numbers(root, ctx.world_size, draw.numel, draw.number, dtype), dtype),
    )


def all_gather(ctx: Any, draw: Draw) -> Pending:
    dtype, numel = draw.choose(DTYPES), draw.numel // ctx.world_size
    out = torch.zeros(ctx.world_size * numel, dtype=getattr(torch, dtype))
    work = ctx.all_gather_into_tensor(
        out, tensor_of(own_numbers(ctx, draw, dtype, numel=numel), dtype), async_op=draw.async_op
    )

    def check() -> bool:
        parts = [numbers(rank, ctx.world_size, numel, draw.number, dtype) for rank in range(ctx.world_size)]
        return holds(out, np.concatenate(parts), dtype)

    return Pending(work=work, check=check)


def reduce_scatter(ctx: Any, draw: Draw) -> Pending:
    dtype, op = draw.choose(DTYPES), draw.choose(tuple(REDUCTIONS), 1)
    numel = draw.numel // ctx.world_size
    whole = tensor_of(own_numbers(ctx, draw, dtype, numel=numel * ctx.world_size), dtype)
    out = torch.zeros(numel, dtype=whole.dtype)
    work = ctx.reduce_scatter_tensor(out, whole, op=op, async_op=draw.async_op)

    def check() -> bool:
        reduced = reduced_numbers(ctx.world_size, numel * ctx.world_size, draw.number, dtype, op)
        return holds(out, reduced[ctx.rank * numel : (ctx.rank + 1) * numel], dtype)

    return Pending(work=work, check=check)


def reduce(ctx: Any, draw: Draw) -> Pending:
    dtype, op = draw.choose(DTYPES), draw.choose(tuple(REDUCTIONS), 1)
    dst = draw.choose(tuple(range(ctx.world_size)), 2)
    own = own_numbers(ctx, draw, dtype)
    value = tensor_of(own, dtype)
    work = ctx.reduce(value, dst, op=op, async_op=draw.async_op)

    def check() -> bool:
        reduced = reduced_numbers(ctx.world_size, draw.numel, draw.number, dtype, op)
        return holds(value, reduced if ctx.rank == dst else own, dtype)

    return Pending(work=work, check=check)


def gather(ctx: Any, draw: Draw) -> Pending:
    dtype, numel = draw.choose(DTYPES), draw.numel // ctx.world_size
    dst, kind = draw.choose(tuple(range(ctx.world_size)), 2), getattr(torch, dtype)
    parts = [torch.zeros(numel, dtype=kind) for _ in range(ctx.world_size)] if ctx.rank == dst else None
    own = tensor_of(own_numbers(ctx, draw, dtype, numel=numel), dtype)
    work = ctx.gather(own, parts, dst, async_op=draw.async_op)

    def check() -> bool:
        return all(
            holds(part, numbers(rank, ctx.world_size, numel, draw.number, dtype), dtype)
            for rank, part in enumerate(parts or [])
        )

    return Pending(work=work, check=check)


def scatter(ctx: Any, draw: Draw) -> Pending:
    dtype, numel = draw.choose(DTYPES), draw.numel // ctx.world_size
    src = draw.choose(tuple(range(ctx.world_size)), 2)
    parts = [numbers(rank, ctx.world_size, numel, draw.number, dtype) for rank in range(ctx.world_size)]
    given = [tensor_of(part, dtype) for part in parts] if ctx.rank == src else None
    out = torch.zeros(numel, dtype=getattr(torch, dtype))
    work = ctx.scatter(out, given, src, async_op=draw.async_op)
    return Pending(work=work, check=lambda: holds(out, parts[ctx.rank], dtype))


def all_to_all(ctx: Any, draw: Draw) -> Pending:
    """Uneven: rank a sends (a + 2 b) mod 4 shares to rank b."""
    dtype, world = draw.choose(DTYPES), ctx.world_size
    share = draw.numel // (4 * world)

    def sent(a: int) -> list[np.ndarray[Any, Any]]:
        sizes = [(a + 2 * b) % 4 * share for b in range(world)]
        return np.split(numbers(a, world, sum(sizes), draw.number, dtype), np.cumsum(sizes)[:-1])

    own, due = sent(ctx.rank), [sent(rank)[ctx.rank] for rank in range(world)]
    out = torch.zeros(sum(part.size for part in due), dtype=getattr(torch, dtype))
    work = ctx.all_to_all_single(
        out,
        tensor_of(np.concatenate(own), dtype),
        [part.size for part in due],
        [part.size for part in own],
        async_op=draw.async_op,
    )
    return Pending(work=work, check=lambda: holds(out, np.concatenate(due), dtype))


def barrier(ctx: Any, draw: Draw) -> Pending:
    return Pending(work=ctx.barrier(async_op=draw.async_op), check=lambda: True)


COLLECTIVES = (
    Kind(name="allreduce", start=allreduce, weight=4),
    Kind(name="allreduce, shared memory", start=allreduce_shared, weight=2),
    Kind(name="broadcast", start=broadcast),
    Kind(name="all_gather", start=all_gather),
    Kind(name="reduce_scatter", start=reduce_scatter),
    Kind(name="reduce", start=reduce),
    Kind(name="gather", start=gather),
    Kind(name="scatter", start=scatter),
    Kind(name="all_to_all", start=all_to_all),
    Kind(name="barrier", start=barrier),
)
