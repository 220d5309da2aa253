"""Times a prepared case and checks it. A call takes as long as on its slowest rank; figures are medians."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hybridcomm import policy
from hybridcomm.bench.cases import COLLECTIVES, Case, Run
from hybridcomm.bench.inputs import gradient

if TYPE_CHECKING:
    from hybridcomm.context import Context

__all__ = ["Row", "measure", "sum_over_ranks"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    ``seconds``: the median call. ``algbw``: nbytes / seconds; ``busbw``: algbw times the collective's bus
    factor, None for a compressed run. ``wrong``: elements that differ from the exact result, over all ranks
    and checks; None where nothing was checked. ``wire_nbytes``: sent to other nodes per call by all ranks;
    ``dense_nbytes``: what the dense plan would send. ``err``: |result - exact| / |exact| of the first call.
    """

    collective: str
    nbytes: int
    count: int
    dtype: str
    op: str
    seconds: float
    algbw: float
    busbw: float | None
    wrong: int | None
    compress: str = "none"
    wire_nbytes: int = 0
    dense_nbytes: int = 0
    err: float | None = None


def measure(context: Context, case: Case, *, iters: int, warmup: int, checks: int) -> Row:
    """Measures ``case``: ``warmup`` calls, ``iters`` timed ones, each on a rewritten input, ``checks`` checked.

    Collective: all ranks of ``context`` call it alike, and get the same row.
    """
    entry = COLLECTIVES[case.collective]
    err = _first_error(context, case) if case.compress != "none" and checks else None
    run = entry.prepare(context, case)
    with _collector_off():
        times, wire = _time(context, run, warmup, iters)
    seconds = statistics.median(times)
    wrong = None
    if checks and run.wanted is not None:
        found = sum(_count_wrong(run, turn) for turn in range(warmup + iters, warmup + iters + checks))
        wrong = int(sum_over_ranks(context, np.array([found], np.int64))[0])
    nbytes = case.numel * policy.itemsize(case.dtype)
    algbw = nbytes / seconds
    lossy = case.compress != "none"
    return Row(
        collective=case.collective,
        nbytes=nbytes,
        count=run.count,
        dtype=case.dtype,
        op=case.op if entry.reduces else "none",
        seconds=seconds,
        algbw=algbw,
        busbw=None if lossy else algbw * entry.bus_factor(context.world_size),
        wrong=wrong,
        compress=case.compress,
        wire_nbytes=wire,
        dense_nbytes=context.plan_allreduce(case.numel, op="sum").wire_nbytes() if lossy else 0,
        err=err,
    )


def sum_over_ranks(context: Context, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Sums of one int64 array per rank."""
    context.allreduce(values)
    return values


def _time(context: Context, run: Run, warmup: int, iters: int) -> tuple[list[float], int]:
    """(seconds of each timed call on its slowest rank, wire bytes of all ranks per call)."""
    own, sent = np.zeros(iters), 0
    for turn in range(warmup + iters):
        run.rewrite(turn)
        context.barrier()  # ranks that rewrite at different speeds must not wait inside the timed call
        before = context.counters()["wire_tx_bytes"]
        begin = time.perf_counter()
        run.call()
        seconds = time.perf_counter() - begin
        if turn >= warmup:
            own[turn - warmup] = seconds
            sent += context.counters()["wire_tx_bytes"] - before
    every = np.zeros((context.world_size, iters))
    context.all_gather_into_tensor(every, own)
    total = int(sum_over_ranks(context, np.array([sent], np.int64))[0])
    return every.max(0).tolist(), total // iters


def _count_wrong(run: Run, turn: int) -> int:
    assert run.wanted is not None  # noqa: S101 (the caller has looked)
    run.rewrite(turn)
    run.call()
    return int((run.out != run.wanted(turn)).sum())


def _first_error(context: Context, case: Case) -> float:
    """Relative error of one call that no residual has touched yet."""
    run = COLLECTIVES[case.collective].prepare(context, case)
    run.rewrite(0)
    run.call()
    wanted = np.zeros(case.numel)
    for rank in range(context.world_size):
        wanted += gradient(rank, case.numel)
    if case.op == "mean":
        wanted /= context.world_size
    size = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(np.asarray(run.out, np.float64) - wanted)) / size if size else 0.0


@contextmanager
def _collector_off() -> Iterator[None]:
    """A garbage collection in one rank would be timed on all."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
