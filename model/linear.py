"""Linear layers: whole, column-parallel or row-parallel, with a backward pass that can be cut in two.

    1 input gradient     what the layer before waits for; where ranks share the layer, their sum is under way while
    2 weight gradient    is computed: at once, or put off (`model.weight_gradients`)

Sources: arXiv 1909.08053 (column and row), 2205.05198 (tokens split over the ranks), 2401.10241 (the two parts).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridcomm.errors import UnsupportedError
from model.sharding import Sharding, draw_whole
from model.tensor_parallel import (
    ALONE,
    COPY,
    GATHER,
    KEEP,
    SCATTER,
    TOTAL,
    Pair,
    TensorParallel,
    without_autocast,
)
from model.weight_gradients import Deferring, WeightGradients, weight_gradient

__all__ = ["ColumnLinear", "Linear", "RowLinear"]


class Linear(nn.Linear, Deferring):
    """y = x W^T without bias, whole on each rank; [..., in] -> [..., out].

    ``summed``: the ranks of ``tp`` see different inputs, and its gradient is the sum of theirs. Under
    ``torch.autocast`` the product is in autocast's dtype, as ``nn.Linear``'s. A layer that ranks share is
    differentiable once; one of a single rank is ``nn.Linear``.
    """

    def __init__(
        self, in_features: int, out_features: int, *, tp: TensorParallel = ALONE, summed: bool = False
    ) -> None:
        super().__init__(in_features, out_features, bias=False)
        self._split(tp, {}, KEEP, KEEP)
        self.partial = {"weight"} if summed and tp.size > 1 else set()

    def _split(self, tp: TensorParallel, sharding: dict[str, Sharding], entry: Pair, exit_: Pair) -> None:
        self.tp, self.sharding, self.partial = tp, sharding, set[str]()
        self.entry, self.exit = (entry, exit_) if tp.size > 1 else (KEEP, KEEP)
        self.noted = tp.size == 1

    def forward(self, x: Tensor, tokens: int = 0) -> Tensor:
        """``tokens`` is their number on all ranks, where the layer gathers or splits them: x is [tokens, in] then."""
        if not self.noted:
            return self._product(x, tokens)
        if self.queue is None:
            return F.linear(x, self.weight)
        return self._uncompiled(x, self.queue) if torch.compiler.is_compiling() else self._note(x, self.queue)

    @torch.compiler.disable  # queues and groups are no matter of graphs
    def _product(self, x: Tensor, tokens: int) -> Tensor:
        return _Product.apply(_cast(x), self.weight, self, tokens)

    def _note(self, x: Tensor, queue: WeightGradients) -> Tensor:
        """torch's own product, of which the queue knows."""
        x, weight = _cast(x), self.weight
        y = F.linear(x, weight)
        queue.note(weight, x, y)
        return y

    @torch.compiler.disable
    def _uncompiled(self, x: Tensor, queue: WeightGradients) -> Tensor:
        return self._note(x, queue)


def _cast(x: Tensor) -> Tensor:
    """To autocast's dtype, where it is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


class ColumnLinear(Linear):
    """A linear layer whose outputs are split: rank r has ``sizes[r]`` of each section (default: `balanced`).

    Its input is the same on all ranks, or under sequence parallelism this rank's tokens; its output has all
    tokens. The sum of the input's gradient over the ranks is under way while the weight's is computed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tp: TensorParallel = ALONE,
        sizes: tuple[int, ...] | None = None,
        sections: int = 1,
    ) -> None:
        sharding = _sharding(0, out_features, sections, sizes, tp)
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, sections * sharding.sizes[tp.rank]
        self._split(tp, {"weight": sharding}, GATHER if tp.sequence else COPY, KEEP)
        _make_weight(self)


class RowLinear(Linear):
    """A linear layer whose inputs are split: rank r has ``sizes[r]`` of them (default: `balanced`).

    Its output is the sum over the ranks: on all of them, or under sequence parallelism each rank's tokens.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tp: TensorParallel = ALONE,
        sizes: tuple[int, ...] | None = None,
    ) -> None:
        sharding = _sharding(1, in_features, 1, sizes, tp)
        nn.Module.__init__(self)
        self.in_features, self.out_features = sharding.sizes[tp.rank], out_features
        self._split(tp, {"weight": sharding}, KEEP, SCATTER if tp.sequence else TOTAL)
        _make_weight(self)


def _sharding(
    dim: int, features: int, sections: int, sizes: tuple[int, ...] | None, tp: TensorParallel
) -> Sharding:
    sharding = Sharding(dim=dim, sizes=sizes or tp.sizes(features // sections), sections=sections)
    if sharding.whole != features or len(sharding.sizes) != tp.size:
        raise UnsupportedError(f"{features} features cannot be split over {tp.size} ranks as {sharding}")
    return sharding


def _make_weight(layer: Linear) -> None:
    layer.register_parameter("bias", None)
    layer.weight = nn.Parameter(torch.empty(layer.out_features, layer.in_features))
    # As nn.Linear draws it, so that one seed gives one model at any number of ranks.
    draw_whole(
        layer, "weight", lambda whole: nn.init.kaiming_uniform_(whole, a=math.sqrt(5)), rank=layer.tp.rank
    )


class _Product(torch.autograd.Function):
    """x W^T with what the layer's edges do to x and y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, layer: Linear, tokens: int) -> Tensor:
        low = weight.to(x.dtype) if torch.is_autocast_enabled(x.device.type) else weight
        ctx.save_for_backward(x, low)
        ctx.weight, ctx.layer, ctx.tokens, ctx.queue = weight, layer, tokens, layer.queue
        whole = layer.entry.forward(layer.tp, x, tokens, False).wait()
        return layer.exit.forward(layer.tp, F.linear(whole, low), tokens, False).wait()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        with without_autocast(grad):
            return *_gradients(ctx, grad), None, None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, low = ctx.saved_tensors
    layer: Linear = ctx.layer
    tp, queue = layer.tp, ctx.queue
    x_needed, weight_needed = ctx.needs_input_grad[:2]
    grad = layer.exit.backward(tp, grad, ctx.tokens, False).wait()
    # Only this rank's tokens were kept: the others come while the input's gradient is computed.
    whole = layer.entry.forward(tp, x, ctx.tokens, True) if weight_needed else None
    x_grad = weight_grad = None
    if x_needed:
        overlaps = weight_needed and queue is None
        x_grad = layer.entry.backward(tp, grad @ low, ctx.tokens, overlaps)
    if whole is not None and queue is None:
        weight_grad = weight_gradient(grad, whole.wait(), ctx.weight.dtype)
    elif whole is not None:  # detached: what x came from leads back to this queue
        source = whole.wait().detach()
        queue.put(ctx.weight, grad, partial(weight_gradient, x=source, dtype=ctx.weight.dtype))
    return None if x_grad is None else x_grad.wait(), weight_grad
