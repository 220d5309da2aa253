"""The kinds of operation that the soak draws from, each with its exact result: add yours to `KINDS`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hybridcomm import Residual
from tests.exact import exact_ints

__all__ = ["KINDS", "Draw", "Kind", "Pending", "forget_inputs"]

FLOATS = ("float32", "float64", "bfloat16", "float16")
INTEGERS = ("int64", "int32")
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
def _values(rank: int, world: int, numel: int, number: int, dtype: str) -> np.ndarray[Any, Any]:
    """Shared by the ranks' threads, so never written."""
    return exact_ints(rank=rank, numel=numel, world=world, call=number, dtype=dtype)


@functools.lru_cache(maxsize=8)
def _reduced(world: int, numel: int, number: int, dtype: str, op: str) -> np.ndarray[Any, Any]:
    parts = [_values(rank, world, numel, number, dtype) for rank in range(world)]
    return functools.reduce(REDUCTIONS[op], parts)


def forget_inputs() -> None:
    """Frees what the ranks share, so that it is not taken for a leak."""
    _values.cache_clear()
    _reduced.cache_clear()


def _tensor(values: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    return torch.from_numpy(values).to(getattr(torch, dtype), copy=True)


def _same(tensor: torch.Tensor, values: np.ndarray[Any, Any], dtype: str) -> bool:
    return torch.equal(tensor, _tensor(values, dtype))


def _inputs(ctx: Any, draw: Draw, dtype: str, *, numel: int | None = None) -> np.ndarray[Any, Any]:
    count = draw.numel if numel is None else numel
    return _values(ctx.rank, ctx.world_size, count, draw.number, dtype)


def allreduce(ctx: Any, draw: Draw) -> Pending:
    dtype, op = draw.choose((*FLOATS, *INTEGERS)), draw.choose(tuple(REDUCTIONS), 1)
    value = _tensor(_inputs(ctx, draw, dtype), dtype)
    work = ctx.allreduce(value, op=op, async_op=draw.async_op)
    return Pending(
        work=work,
        check=lambda: _same(value, _reduced(ctx.world_size, draw.numel, draw.number, dtype, op), dtype),
    )


def allreduce_shared(ctx: Any, draw: Draw) -> Pending:
    """On a tensor in shared memory, which comes and goes."""
    value = ctx.empty(draw.numel, dtype=torch.float32)
    value.copy_(_tensor(_inputs(ctx, draw, "float32"), "float32"))
    work = ctx.allreduce(value, async_op=draw.async_op)
    return Pending(
        work=work,
        check=lambda: _same(
            value, _reduced(ctx.world_size, draw.numel, draw.number, "float32", "sum"), "float32"
        ),
    )


def allreduce_compressed(ctx: Any, draw: Draw) -> Pending:
    """All elements are kept, and sums of 8 bits need no rounding in records of 10: nothing is lost."""
    value = _tensor(_inputs(ctx, draw, "bfloat16"), "float32")
    residual = Residual()
    work = ctx.allreduce(value, compress="topk:1/b64", residual=residual, async_op=draw.async_op)
    return Pending(
        work=work,
        check=lambda: _same(
            value, _reduced(ctx.world_size, draw.numel, draw.number, "bfloat16", "sum"), "float32"
        ),
    )


def broadcast(ctx: Any, draw: Draw) -> Pending:
    dtype, root = draw.choose((*FLOATS, *INTEGERS)), draw.choose(tuple(range(ctx.world_size)), 1)
    value = _tensor(_inputs(ctx, draw, dtype), dtype)
    work = ctx.broadcast(value, root, async_op=draw.async_op)
    return Pending(
        work=work,
        check=lambda: _same(value, _values(root, ctx.world_size, draw.numel, draw.number, dtype), dtype),
    )


def all_gather(ctx: Any, draw: Draw) -> Pending:
    dtype, numel = draw.choose((*FLOATS, *INTEGERS)), draw.numel // ctx.world_size
    out = torch.zeros(ctx.world_size * numel, dtype=getattr(torch, dtype))
    work = ctx.all_gather_into_tensor(
        out, _tensor(_inputs(ctx, draw, dtype, numel=numel), dtype), async_op=draw.async_op
    )

    def check() -> bool:
        parts = [_values(rank, ctx.world_size, numel, draw.number, dtype) for rank in range(ctx.world_size)]
        return _same(out, np.concatenate(parts), dtype)

    return Pending(work=work, check=check)


def reduce_scatter(ctx: Any, draw: Draw) -> Pending:
    dtype, op = draw.choose((*FLOATS, *INTEGERS)), draw.choose(tuple(REDUCTIONS), 1)
    numel = draw.numel // ctx.world_size
    whole = _tensor(_inputs(ctx, draw, dtype, numel=numel * ctx.world_size), dtype)
    out = torch.zeros(numel, dtype=whole.dtype)
    work = ctx.reduce_scatter_tensor(out, whole, op=op, async_op=draw.async_op)

    def check() -> bool:
        reduced = _reduced(ctx.world_size, numel * ctx.world_size, draw.number, dtype, op)
        return _same(out, reduced[ctx.rank * numel : (ctx.rank + 1) * numel], dtype)

    return Pending(work=work, check=check)


def reduce(ctx: Any, draw: Draw) -> Pending:
    dtype, op = draw.choose((*FLOATS, *INTEGERS)), draw.choose(tuple(REDUCTIONS), 1)
    dst = draw.choose(tuple(range(ctx.world_size)), 2)
    own = _inputs(ctx, draw, dtype)
    value = _tensor(own, dtype)
    work = ctx.reduce(value, dst, op=op, async_op=draw.async_op)

    def check() -> bool:
        reduced = _reduced(ctx.world_size, draw.numel, draw.number, dtype, op)
        return _same(value, reduced if ctx.rank == dst else own, dtype)

    return Pending(work=work, check=check)


def gather(ctx: Any, draw: Draw) -> Pending:
    dtype, numel = draw.choose((*FLOATS, *INTEGERS)), draw.numel // ctx.world_size
    dst, kind = draw.choose(tuple(range(ctx.world_size)), 2), getattr(torch, dtype)
    parts = [torch.zeros(numel, dtype=kind) for _ in range(ctx.world_size)] if ctx.rank == dst else None
    own = _tensor(_inputs(ctx, draw, dtype, numel=numel), dtype)
    work = ctx.gather(own, parts, dst, async_op=draw.async_op)

    def check() -> bool:
        return all(
            _same(part, _values(rank, ctx.world_size, numel, draw.number, dtype), dtype)
            for rank, part in enumerate(parts or [])
        )

    return Pending(work=work, check=check)


def scatter(ctx: Any, draw: Draw) -> Pending:
    dtype, numel = draw.choose((*FLOATS, *INTEGERS)), draw.numel // ctx.world_size
    src = draw.choose(tuple(range(ctx.world_size)), 2)
    parts = [_values(rank, ctx.world_size, numel, draw.number, dtype) for rank in range(ctx.world_size)]
    given = [_tensor(part, dtype) for part in parts] if ctx.rank == src else None
    out = torch.zeros(numel, dtype=getattr(torch, dtype))
    work = ctx.scatter(out, given, src, async_op=draw.async_op)
    return Pending(work=work, check=lambda: _same(out, parts[ctx.rank], dtype))


def all_to_all(ctx: Any, draw: Draw) -> Pending:
    """Uneven: rank a sends (a + 2 b) mod 4 shares to rank b."""
    dtype, world = draw.choose((*FLOATS, *INTEGERS)), ctx.world_size
    share = draw.numel // (4 * world)

    def sent(a: int) -> list[np.ndarray[Any, Any]]:
        sizes = [(a + 2 * b) % 4 * share for b in range(world)]
        return np.split(_values(a, world, sum(sizes), draw.number, dtype), np.cumsum(sizes)[:-1])

    own, due = sent(ctx.rank), [sent(rank)[ctx.rank] for rank in range(world)]
    out = torch.zeros(sum(part.size for part in due), dtype=getattr(torch, dtype))
    work = ctx.all_to_all_single(
        out,
        _tensor(np.concatenate(own), dtype),
        [part.size for part in due],
        [part.size for part in own],
        async_op=draw.async_op,
    )
    return Pending(work=work, check=lambda: _same(out, np.concatenate(due), dtype))


def barrier(ctx: Any, draw: Draw) -> Pending:
    return Pending(work=ctx.barrier(async_op=draw.async_op), check=lambda: True)


KINDS = (
    Kind(name="allreduce", start=allreduce, weight=4),
    Kind(name="allreduce, shared memory", start=allreduce_shared, weight=2),
    Kind(name="allreduce, compressed", start=allreduce_compressed, weight=2),
    Kind(name="broadcast", start=broadcast),
    Kind(name="all_gather", start=all_gather),
    Kind(name="reduce_scatter", start=reduce_scatter),
    Kind(name="reduce", start=reduce),
    Kind(name="gather", start=gather),
    Kind(name="scatter", start=scatter),
    Kind(name="all_to_all", start=all_to_all),
    Kind(name="barrier", start=barrier),
)
