"""Tensor parallelism: the ranks that share a layer, and the collectives that its activations go through.

A layer is given a `TensorParallel` value: a hybridcomm group, or none for a single rank. What happens to activations
at its edges comes in pairs, each the other's gradient (arXiv 1909.08053, figure 3; 2205.05198, figure 5):

    pair       forward           backward
    COPY       nothing           all-reduce         into a column-parallel layer
    TOTAL      all-reduce        nothing            out of a row-parallel layer
    GATHER     all-gather        reduce-scatter     COPY, where tokens are split over the ranks
    SCATTER    reduce-scatter    all-gather         TOTAL, likewise
    SPREAD     own part          all-gather         from tokens that all ranks have to split ones

Sums are formed in the group's order: all ranks hold the same bits, in every run.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridcomm.errors import UnsupportedError
from hybridcomm.groups import Grouping
from hybridcomm.work import Work
from model.sharding import Sharding, balanced, partial_parameters, shardings

__all__ = [
    "ALONE", "COPY", "GATHER", "KEEP", "SCATTER", "SPREAD", "TOTAL",
    "Pair", "Pending", "TensorParallel",
    "check_alike", "gather_state", "sum_partial_gradients", "through", "without_autocast",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TensorParallel:
    """The ranks that share each layer: a hybridcomm group (or context), None for one rank.

    ``sequence``: between the parallel layers each rank has a part of the tokens (`balanced`), instead of all ranks
    having them all.
    """

    group: Grouping | None = None
    sequence: bool = False

    def __post_init__(self) -> None:
        if self.sequence and self.size == 1:
            raise UnsupportedError(
                "sequence parallelism splits tokens over tensor-parallel ranks: here is one alone"
            )

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.world_size

    def __deepcopy__(self, memo: object) -> TensorParallel:
        return self  # copies of a model share their ranks' group

    def sizes(self, total: int) -> tuple[int, ...]:
        """How many of ``total`` heads, channels, items or tokens each rank has."""
        return balanced(total, self.size)


ALONE = TensorParallel()
"""One rank that has whole layers."""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A tensor that a collective may still be writing."""

    tensor: Tensor
    work: Work | None = None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


Edge = Callable[[TensorParallel, Tensor, int, bool], Pending]
"""(ranks, tensor, tokens of all ranks, whether to return before it is done) -> what becomes of it."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What is done to activations, and to their gradients on the way back."""

    forward: Edge
    backward: Edge


def _nothing(tp: TensorParallel, t: Tensor, tokens: int, async_op: bool) -> Pending:
    return Pending(tensor=t)


def _all_reduce(tp: TensorParallel, t: Tensor, tokens: int, async_op: bool) -> Pending:
    """In place where it can be: ``t`` is the caller's to give."""
    t = t.contiguous()
    return Pending(tensor=t, work=_group(tp).allreduce(t, async_op=async_op))


def _all_gather(tp: TensorParallel, t: Tensor, tokens: int, async_op: bool) -> Pending:
    whole = t.new_empty(tokens, *t.shape[1:])
    parts = list(whole.split(list(tp.sizes(tokens))))
    return Pending(tensor=whole, work=_group(tp).all_gather(parts, t.contiguous(), async_op=async_op))


def _reduce_scatter(tp: TensorParallel, t: Tensor, tokens: int, async_op: bool) -> Pending:
    sizes = tp.sizes(tokens)
    own = t.new_empty(sizes[tp.rank], *t.shape[1:])
    parts = list(t.contiguous().split(list(sizes)))
    return Pending(tensor=own, work=_group(tp).reduce_scatter(own, parts, async_op=async_op))


def _own_part(tp: TensorParallel, t: Tensor, tokens: int, async_op: bool) -> Pending:
    return Pending(tensor=t.split(list(tp.sizes(tokens)))[tp.rank].clone())


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """A block in which products are in their operands' dtype, on the device of ``t``."""
    device = t.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


KEEP = Pair(forward=_nothing, backward=_nothing)
COPY = Pair(forward=_nothing, backward=_all_reduce)
TOTAL = Pair(forward=_all_reduce, backward=_nothing)
GATHER = Pair(forward=_all_gather, backward=_reduce_scatter)
SCATTER = Pair(forward=_reduce_scatter, backward=_all_gather)
SPREAD = Pair(forward=_own_part, backward=_all_gather)


def through(x: Tensor, pair: Pair, tp: TensorParallel, *, tokens: int = 0) -> Tensor:
    """``x`` through an edge outside a layer; ``tokens`` of all ranks where the pair splits or gathers them
    ([tokens, ...])."""
    return x if tp.size == 1 else _through(x, pair, tp, tokens)


@torch.compiler.disable
def _through(x: Tensor, pair: Pair, tp: TensorParallel, tokens: int) -> Tensor:
    return _Through.apply(x, pair, tp, tokens)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pair: Pair, tp: TensorParallel, tokens: int) -> Tensor:
        ctx.edge = pair.backward, tp, tokens
        return pair.forward(tp, x.detach().clone(), tokens, False).wait()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        edge, tp, tokens = ctx.edge
        return edge(tp, grad.clone(), tokens, False).wait(), None, None, None


def sum_partial_gradients(module: nn.Module, tp: TensorParallel) -> None:
    """Adds up over the ranks, in place, the gradients of `partial_parameters`: one all-reduce for each dtype.

    Call it on all ranks when backward is done, before the gradients are clipped or applied.
    """
    if tp.size == 1:
        return
    kinds: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in dict.fromkeys(partial_parameters(module).values()):  # once, where stages share one
        if parameter.requires_grad:
            kinds.setdefault(parameter.dtype, []).append(parameter)
    for parameters in kinds.values():
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        _group(tp).allreduce(flat)
        for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(total.view_as(parameter))


def check_alike(module: nn.Module, tp: TensorParallel) -> None:
    """Raises `UnsupportedError` on all ranks where they differ in what is not split; all of them call it."""
    if tp.size == 1:
        return
    split = shardings(module)
    kept = {n: p for n, p in module.named_parameters() if n not in split}
    own = torch.tensor(
        [zlib.crc32(t.detach().cpu().contiguous().view(torch.uint8).numpy()) for t in kept.values()],
        dtype=torch.int64,
    )
    every = own.new_empty(tp.size, len(own))
    _group(tp).all_gather(every, own)
    wrong = [name for name, column in zip(kept, every.T, strict=True) if (column != column[0]).any()]
    if wrong:
        raise UnsupportedError(
            f"tensor-parallel ranks differ in {', '.join(wrong)}: start all of them from one seed"
        )


def gather_state(module: nn.Module, tp: TensorParallel) -> dict[str, Tensor]:
    """The whole state dict of a module that is split over ``tp``, on every rank; all of them call it."""
    state, split = module.state_dict(), shardings(module)
    if tp.size == 1:
        return dict(state)
    return {
        name: _gathered(value, split[name], tp) if name in split else value for name, value in state.items()
    }


def _gathered(own: Tensor, sharding: Sharding, tp: TensorParallel) -> Tensor:
    shape = list(own.shape)
    parts = []
    for size in sharding.sizes:
        shape[sharding.dim] = sharding.sections * size
        parts.append(own.new_empty(shape))
    _group(tp).all_gather(parts, own.contiguous())
    return sharding.join(parts)


def _group(tp: TensorParallel) -> Grouping:
    if tp.group is None:
        raise UnsupportedError("a collective of one rank that has no group: ask TensorParallel.size first")
    return tp.group
