"""The table of collectives: nccl-tests' bus factor of each, its inputs, its call, its exact result.

A collective is one line of ``COLLECTIVES`` and one function that prepares a `Run`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hybridcomm.arrays import Array
from hybridcomm.bench.inputs import PERIOD, array_of, exact, gradient, pattern
from hybridcomm.residual import Residual

if TYPE_CHECKING:
    from hybridcomm.context import Context

__all__ = ["COLLECTIVES", "Case", "Collective", "Run"]

_SENTINEL = 111  # more than any pattern holds: an element that nothing wrote is wrong


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line to measure: ``numel`` elements of ``dtype`` in the larger of the call's tensors."""

    collective: str
    numel: int
    dtype: str
    op: str
    compress: str = "none"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A prepared case. ``rewrite(turn)`` writes this rank's input, ``call()`` is what is timed.

    After it ``out`` holds the result, which ``wanted(turn)`` tells exactly (None: a lossy run). ``count``
    is nccl-tests' count column.
    """

    rewrite: Callable[[int], None]
    call: Callable[[], object]
    out: Array
    wanted: Callable[[int], Array] | None
    count: int


@dataclass(frozen=True, kw_only=True)
class Collective:
    """``bus_factor(W)``: busbw / algbw, the share of the data that crosses the busiest link.

    ``parts``: the tensor has one part per rank, so its size is a multiple of W. ``reduces``: takes ``--op``.
    """

    prepare: Callable[[Context, Case], Run]
    bus_factor: Callable[[int], float]
    parts: bool = False
    reduces: bool = False


@dataclass(kw_only=True)
class _Cyclic:
    """A pattern long enough that every turn reads it from another place: inputs differ per call for free."""

    numbers: np.ndarray
    numel: int
    dtype: str
    array: Array = field(init=False)

    def __post_init__(self) -> None:
        self.array = array_of(self.numbers, self.numel + PERIOD, self.dtype)

    def at(self, turn: int) -> Array:
        begin = turn % PERIOD
        return self.array[begin : begin + self.numel]


def _own(context: Context, case: Case, rank: int, numel: int) -> _Cyclic:
    numbers = pattern(rank, world_size=context.world_size, dtype=case.dtype, op=case.op)
    return _Cyclic(numbers=numbers, numel=numel, dtype=case.dtype)


def _reduced(context: Context, case: Case, numel: int) -> _Cyclic:
    numbers = exact(case.op, world_size=context.world_size, dtype=case.dtype)
    return _Cyclic(numbers=numbers, numel=numel, dtype=case.dtype)


def _filled(case: Case, numel: int) -> Array:
    return array_of(np.array([_SENTINEL]), numel, case.dtype)


def _allreduce(context: Context, case: Case) -> Run:
    if case.compress != "none":
        return _compressed(context, case)
    own, want = (
        _own(context, case, context.rank, case.numel),
        _reduced(context, case, case.numel),
    )
    tensor = _filled(case, case.numel)

    def rewrite(turn: int) -> None:
        tensor[:] = own.at(turn)

    return Run(
        rewrite=rewrite,
        call=lambda: context.allreduce(tensor, op=case.op),
        out=tensor,
        wanted=want.at,
        count=case.numel,
    )


def _compressed(context: Context, case: Case) -> Run:
    """Error feedback included, as training has it: the residual is read and written by every call."""
    own, tensor = gradient(context.rank, case.numel), np.zeros(case.numel, np.float32)
    residual = Residual()

    def rewrite(_: int) -> None:
        np.copyto(tensor, own)
        residual.commit()

    def call() -> None:
        context.allreduce(tensor, op=case.op, compress=case.compress, residual=residual)

    return Run(rewrite=rewrite, call=call, out=tensor, wanted=None, count=case.numel)


def _broadcast(context: Context, case: Case) -> Run:
    own, want = (_own(context, case, rank, case.numel) for rank in (context.rank, 0))
    tensor = _filled(case, case.numel)

    def rewrite(turn: int) -> None:
        tensor[:] = own.at(turn)

    return Run(
        rewrite=rewrite,
        call=lambda: context.broadcast(tensor, 0),
        out=tensor,
        wanted=want.at,
        count=case.numel,
    )


def _all_gather(context: Context, case: Case) -> Run:
    part = case.numel // context.world_size
    every = [_own(context, case, rank, part) for rank in range(context.world_size)]
    tensor, out, want = (_filled(case, n) for n in (part, case.numel, case.numel))

    def rewrite(turn: int) -> None:
        tensor[:] = every[context.rank].at(turn)
        out[:] = _SENTINEL

    def wanted(turn: int) -> Array:
        for rank, own in enumerate(every):
            want[rank * part : (rank + 1) * part] = own.at(turn)
        return want

    return Run(
        rewrite=rewrite,
        call=lambda: context.all_gather_into_tensor(out, tensor),
        out=out,
        wanted=wanted,
        count=part,
    )


def _reduce_scatter(context: Context, case: Case) -> Run:
    part = case.numel // context.world_size
    own, want = (
        _own(context, case, context.rank, case.numel),
        _reduced(context, case, case.numel),
    )
    tensor, out = _filled(case, case.numel), _filled(case, part)

    def rewrite(turn: int) -> None:
        tensor[:] = own.at(turn)
        out[:] = _SENTINEL

    return Run(
        rewrite=rewrite,
        call=lambda: context.reduce_scatter_tensor(out, tensor, op=case.op),
        out=out,
        wanted=lambda turn: _part(want.at(turn), context),
        count=part,
    )


def _reduce(context: Context, case: Case) -> Run:
    """To rank 0; the others must still hold what they gave."""
    own = _own(context, case, context.rank, case.numel)
    want = _reduced(context, case, case.numel) if context.rank == 0 else own
    tensor = _filled(case, case.numel)

    def rewrite(turn: int) -> None:
        tensor[:] = own.at(turn)

    return Run(
        rewrite=rewrite,
        call=lambda: context.reduce(tensor, 0, op=case.op),
        out=tensor,
        wanted=want.at,
        count=case.numel,
    )


def _gather(context: Context, case: Case) -> Run:
    """To rank 0; the others must still hold what they gave."""
    part, root = case.numel // context.world_size, context.rank == 0
    every = [_own(context, case, rank, part) for rank in range(context.world_size)]
    tensor, out, want = (_filled(case, n) for n in (part, case.numel, case.numel))
    parts = [out[r * part : (r + 1) * part] for r in range(context.world_size)]

    def rewrite(turn: int) -> None:
        tensor[:] = every[context.rank].at(turn)
        out[:] = _SENTINEL

    def wanted(turn: int) -> Array:
        for rank, own in enumerate(every):
            want[rank * part : (rank + 1) * part] = own.at(turn)
        return want if root else every[context.rank].at(turn)

    return Run(
        rewrite=rewrite,
        call=lambda: context.gather(tensor, parts if root else None, 0),
        out=out if root else tensor,
        wanted=wanted,
        count=part,
    )


def _scatter(context: Context, case: Case) -> Run:
    part, root = case.numel // context.world_size, context.rank == 0
    own = _own(context, case, 0, case.numel)
    tensor, out = _filled(case, case.numel), _filled(case, part)
    parts = [tensor[r * part : (r + 1) * part] for r in range(context.world_size)]

    def rewrite(turn: int) -> None:
        tensor[:] = own.at(turn)
        out[:] = _SENTINEL

    return Run(
        rewrite=rewrite,
        call=lambda: context.scatter(out, parts if root else None, 0),
        out=out,
        wanted=lambda turn: _part(own.at(turn), context),
        count=part,
    )


def _all_to_all(context: Context, case: Case) -> Run:
    every = [_own(context, case, rank, case.numel) for rank in range(context.world_size)]
    part = case.numel // context.world_size
    tensor, out, want = (_filled(case, case.numel) for _ in range(3))

    def rewrite(turn: int) -> None:
        tensor[:] = every[context.rank].at(turn)
        out[:] = _SENTINEL

    def wanted(turn: int) -> Array:
        for rank, own in enumerate(every):
            want[rank * part : (rank + 1) * part] = _part(own.at(turn), context)
        return want

    return Run(
        rewrite=rewrite,
        call=lambda: context.all_to_all_single(out, tensor),
        out=out,
        wanted=wanted,
        count=part,
    )


def _part(whole: Array, context: Context) -> Array:
    """This rank's part of W equal ones."""
    part = len(whole) // context.world_size
    return whole[context.rank * part : (context.rank + 1) * part]


def _others(world_size: int) -> float:
    return (world_size - 1) / world_size


COLLECTIVES = {
    "allreduce": Collective(prepare=_allreduce, bus_factor=lambda world: 2 * _others(world), reduces=True),
    "broadcast": Collective(prepare=_broadcast, bus_factor=lambda _: 1.0),
    "all_gather": Collective(prepare=_all_gather, bus_factor=_others, parts=True),
    "reduce_scatter": Collective(prepare=_reduce_scatter, bus_factor=_others, parts=True, reduces=True),
    "reduce": Collective(prepare=_reduce, bus_factor=lambda _: 1.0, reduces=True),
    "gather": Collective(prepare=_gather, bus_factor=_others, parts=True),
    "scatter": Collective(prepare=_scatter, bus_factor=_others, parts=True),
    "all_to_all": Collective(prepare=_all_to_all, bus_factor=_others, parts=True),
}
"""Collective -> its line; the factors are those of nccl-tests' PERFORMANCE.md."""
