"""Cases of one all-reduce at a time: every codec with error feedback, and dense ones.

Each is called on every rank with what is its own, and returns what is wrong: values that are not the host's bits or,
where NCCL's own order of sums decides, not the exact sums of integers, or beyond the bound of that sum's roundings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hybridcomm.residual import Residual
from hybridcomm.selftest.rank import Rank, all_differ, differ, gradient, near, numbers, total

__all__ = ["Body", "dense", "draws", "feedback", "reals", "same_residual"]

Body = Callable[[Rank], list[str]]


def same_residual(on_device: Residual, on_host: Residual) -> list[str]:
    """A line for each part of a residual that is another."""
    kept, wanted = on_device.state_dict(), on_host.state_dict()
    if kept.keys() != wanted.keys():
        return [f"value: residuals of {sorted(kept)}, not of {sorted(wanted)}"]
    return [f"value: residual {k}" for k in wanted if not (kept[k] == wanted[k]).all()]


def feedback(
    codec: str, exchange: str, numel: int, steps: int = 3, *, decay: float = 1.0, spoilt: int = -1
) -> Body:
    """Each step's mean with error feedback, and the residual in the end; the second step is rolled back. ``spoilt``: a
    step in which rank 0 has a NaN."""

    def body(rank: Rank) -> list[str]:
        rank.align()
        on_host, on_device, wrong = Residual(decay=decay), Residual(decay=decay), list[str]()
        for step in range(steps):
            want = gradient(numel, rank.rank, step)
            if step == spoilt and rank.rank == 0:
                want[numel // 3] = float("nan")
            tensor = rank.upload(want)
            rank.host.allreduce(want, op="mean", compress=codec, residual=on_host, exchange=exchange)
            rank.device.allreduce(tensor, op="mean", compress=codec, residual=on_device, exchange=exchange)
            wrong += differ(f"step {step}", rank.download(tensor), want)
            for residual in (on_host, on_device):
                residual.rollback() if step == 1 else residual.commit()
        return wrong + same_residual(on_device, on_host)

    return body


def draws(codec: str, numel: int) -> Body:
    """Of one tensor, nobody waiting in between: every call draws anew, and as the host does."""

    def body(rank: Rank) -> list[str]:
        rank.align()
        grad = gradient(numel, rank.rank, 0)
        want = [grad.clone() for _ in range(3)]
        for each in want:
            rank.host.allreduce(each, compress=codec)
        tensors = [rank.upload(grad) for _ in range(3)]
        works = [rank.device.allreduce(tensor, compress=codec, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()
        wrong = all_differ(rank, tensors, want)
        same = [i for i in range(2) if torch.equal(want[i], want[i + 1])]
        return wrong + [f"value: call {i} of the host's drew what the one before did" for i in same]

    return body


def dense(dtype: torch.dtype, *, flat: bool, numel: int) -> Body:
    """Sum, mean and maximum of integers: exact, the mean within its roundings where it is no power of two."""

    def body(rank: Rank) -> list[str]:
        world, wrong = rank.world, list[str]()
        sums = total(rank, numel).double()
        most = numbers(numel, world - 1).double()
        for op, want in (("sum", sums), ("mean", sums / world), ("max", most)):
            tensor = rank.upload(numbers(numel, rank.rank).to(dtype))
            rank.device.allreduce(tensor, op=op, flat=flat)
            got = rank.download(tensor)
            if op == "mean" and world & (world - 1):
                wrong += near("mean", got, want, _magnitudes(rank, numel) / world, world)
            else:
                wrong += differ(op, got.double(), want)
        return wrong

    return body


def _magnitudes(rank: Rank, numel: int) -> torch.Tensor:
    ranks = range(rank.world)
    return sum((numbers(numel, r).abs().double() for r in ranks), torch.zeros(numel, dtype=torch.double))


def reals(*, flat: bool, numel: int) -> Body:
    """Sum and mean of what gradients are like, in whichever order NCCL sums; the same bits on all ranks."""

    def body(rank: Rank) -> list[str]:
        every = [gradient(numel, r, 0).double() for r in range(rank.world)]
        nothing, wrong = torch.zeros(numel, dtype=torch.double), list[str]()
        want, scale = sum(every, nothing), sum((each.abs() for each in every), nothing)
        for op, factor in (("sum", 1.0), ("mean", 1.0 / rank.world)):
            tensor = rank.upload(gradient(numel, rank.rank, 0))
            rank.device.allreduce(tensor, op=op, flat=flat)
            got = rank.download(tensor)
            wrong += near(op, got, want * factor, scale * factor, rank.world)
            first = got.clone()
            rank.host.broadcast(first, 0)
            wrong += differ(f"{op}, beside rank 0's", got, first)
        return wrong

    return body
