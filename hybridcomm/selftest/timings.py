"""Times of the GPU engine: device time between events, the median of rounds, on the slowest rank.

A round is several calls, one behind another, begun together. Bandwidths are those of `hybridcomm.bench`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from hybridcomm.bench.cases import COLLECTIVES
from hybridcomm.bench.measure import Row
from hybridcomm.reducer import Reducer
from hybridcomm.residual import Residual
from hybridcomm.selftest.rank import Rank, gradient

__all__ = ["Exposed", "Table", "compressed", "dense", "exposed", "peer", "seconds_of"]

CALLS = 5  # of a round
_WARMUP = 2  # rounds
_LAYERS = 8


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under a title."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Exposed:
    """Of a training step, medians over steps on the slowest rank, in s: from the last gradient to all means in place
    (``exposed``), and all of backward and communication (``step``)."""

    compress: str
    numel: int
    step: float
    exposed: float


def seconds_of(rank: Rank, call: Callable[[], object], rounds: int) -> float:
    """Device time of one call, in s, the same on all ranks."""
    own = []
    for turn in range(rounds + _WARMUP):
        rank.torch.synchronize()
        rank.host.barrier()
        begin = rank.torch.mark()
        for _ in range(CALLS):
            call()
        seconds = rank.torch.seconds(begin, rank.torch.mark()) / CALLS
        if turn >= _WARMUP:
            own.append(seconds)
    return _slowest(rank, own)


def _slowest(rank: Rank, own: Sequence[float]) -> float:
    """Median over rounds of the slowest rank's."""
    every = np.zeros((rank.world, len(own)))
    rank.host.all_gather_into_tensor(every, np.array(own))
    return float(statistics.median(every.max(0).tolist()))


def _row(rank: Rank, name: str, numel: int, seconds: float) -> Row:
    entry, nbytes = COLLECTIVES[name], 4 * numel
    return Row(
        collective=name,
        nbytes=nbytes,
        count=numel // rank.world if entry.parts and name != "all_to_all" else numel,
        dtype="float32",
        op="sum" if entry.reduces else "none",
        seconds=seconds,
        algbw=nbytes / seconds,
        busbw=nbytes / seconds * entry.bus_factor(rank.world),
        wrong=None,
    )


def dense(rank: Rank, sizes: Sequence[int], rounds: int) -> list[Table]:
    """Every verb that is not compressed, of ``sizes`` bytes of float32."""
    device, tables = rank.device, []
    calls: dict[str, tuple[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]]] = {
        "allreduce, dense flat": ("allreduce", lambda whole, _, __: device.allreduce(whole, flat=True)),
        "allreduce, dense staged": ("allreduce", lambda whole, _, __: device.allreduce(whole, flat=False)),
        "broadcast": ("broadcast", lambda whole, _, __: device.broadcast(whole, 0)),
        "reduce": ("reduce", lambda whole, _, __: device.reduce(whole, 0)),
        "all_gather": ("all_gather", lambda whole, _, part: device.all_gather_into_tensor(whole, part)),
        "reduce_scatter": (
            "reduce_scatter",
            lambda whole, _, part: device.reduce_scatter_tensor(part, whole),
        ),
        "all_to_all": ("all_to_all", lambda whole, other, _: device.all_to_all_single(other, whole)),
    }
    for title, (name, call) in calls.items():
        rows = []
        for numel in _numels(rank, sizes):
            whole, other = (rank.upload(torch.zeros(numel)) for _ in range(2))
            part = rank.upload(torch.zeros(numel // rank.world))
            seconds = seconds_of(rank, partial(call, whole, other, part), rounds)
            rows.append(_row(rank, name, numel, seconds))
        tables.append(Table(title=title, rows=tuple(rows)))
    return tables


def peer(
    rank: Rank, allreduce: Callable[[torch.Tensor], object], sizes: Sequence[int], rounds: int
) -> list[Table]:
    """Another library's all-reduce in place."""
    rows = []
    for numel in _numels(rank, sizes):
        tensor = rank.upload(torch.zeros(numel))
        rows.append(_row(rank, "allreduce", numel, seconds_of(rank, partial(allreduce, tensor), rounds)))
    return [Table(title="allreduce of torch.distributed, NCCL", rows=tuple(rows))]


def compressed(rank: Rank, codec: str, sizes: Sequence[int], rounds: int) -> list[Table]:
    """All-reduces with error feedback, as training has them."""
    rows = []
    for numel in _numels(rank, sizes):
        dense_nbytes = rank.host.plan_allreduce(numel, op="sum").wire_nbytes()
        tensor, residual = rank.upload(gradient(numel, rank.rank, 0)), Residual()
        err = _error(rank, codec, numel)
        wire = [rank.device.allreduce(tensor, compress=codec, async_op=True)]
        sent = np.array([wire[0].wire_nbytes], np.int64)
        wire[0].wait()
        rank.host.allreduce(sent)

        def call(tensor: torch.Tensor = tensor, residual: Residual = residual) -> None:
            rank.device.allreduce(tensor, op="mean", compress=codec, residual=residual)
            residual.commit()

        seconds = seconds_of(rank, call, rounds)
        rows.append(
            Row(
                collective="allreduce",
                nbytes=4 * numel,
                count=numel,
                dtype="float32",
                op="mean",
                seconds=seconds,
                algbw=4 * numel / seconds,
                busbw=None,
                wrong=None,
                compress=codec,
                wire_nbytes=int(sent[0]),
                dense_nbytes=dense_nbytes,
                err=err,
            )
        )
    return [Table(title=f"allreduce, {codec}, with error feedback", rows=tuple(rows))]


def _error(rank: Rank, codec: str, numel: int) -> float:
    """|result - exact| / |exact| of a call without residual."""
    lossy, exact = (rank.upload(gradient(numel, rank.rank, 0)) for _ in range(2))
    rank.device.allreduce(lossy, compress=codec)
    rank.device.allreduce(exact)
    want = rank.download(exact).double()
    return float((rank.download(lossy).double() - want).norm() / want.norm())


def exposed(rank: Rank, compress: str | None, numel: int, rounds: int) -> Exposed:
    """Training steps of a stack of layers of about ``numel`` parameters in all, on one stream beside the engine's."""
    width = max(int((numel / _LAYERS) ** 0.5) // 16 * 16, 16)
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(_LAYERS)]
    module = torch.nn.Sequential(*layers)
    rank.torch.place(module)
    reducer = Reducer(module, ctx=rank.device, compress=compress)
    data = rank.upload(torch.randn(256, width))
    steps, tails = [], []
    try:
        for turn in range(rounds + _WARMUP):
            loss = module(data).square().mean()
            rank.torch.synchronize()
            rank.host.barrier()
            begin = rank.torch.mark()
            loss.backward()
            middle = rank.torch.mark()
            reducer.finalize()
            end = rank.torch.mark()
            reducer.commit()
            if turn >= _WARMUP:
                steps.append(rank.torch.seconds(begin, end))
                tails.append(rank.torch.seconds(middle, end))
            for parameter in module.parameters():
                parameter.grad = None
    finally:
        reducer.close()
    return Exposed(
        compress=str(compress or "none"),
        numel=_LAYERS * width * width,
        step=_slowest(rank, steps),
        exposed=_slowest(rank, tails),
    )


def _numels(rank: Rank, sizes: Sequence[int]) -> list[int]:
    """Elements of each size: multiples of 16 per rank, which kernels and parts need."""
    unit = 16 * rank.world
    return list(dict.fromkeys(max(nbytes // 4 // unit, 1) * unit for nbytes in sizes))
