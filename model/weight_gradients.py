"""The second part of a backward pass, put off: weight gradients in queues that are run when there is time.

Zero-bubble pipelines (arXiv 2401.10241) send a stage's input gradient off as soon as it is there, and fill
waits with the weights'.

Layers of one rank are torch's own products, forward and backward: a queue notes which they were, and asks autograd for
the gradients of their outputs in place of their weights'. An autograd function for each would say the same in fewer
lines, and take a tenth of a millisecond for each product and direction: between large products Python runs from
cold caches. Layers that ranks share, or whose forward runs again in backward, have one (`model.linear`).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from hybridcomm.errors import UnsupportedError
from model.tensor_parallel import without_autocast

__all__ = ["Deferrable", "Deferring", "WeightGradients", "recompute", "weight_gradient"]


class Deferring(nn.Module):
    """A layer that gives its weight's gradient to ``queue``, if there is one when its forward runs.

    ``noted``: its products are torch's own, of which the queue takes note; else they are autograd functions, which know
    the queue.
    """

    queue: WeightGradients | None = None
    noted: bool = False


def recompute(module: nn.Module) -> None:
    """Says that checkpoints run the forward of ``module`` again in backward, before it runs first: what is noted would
    stay in memory."""
    for layer in module.modules():
        if isinstance(layer, Deferring):
            layer.noted = False


@dataclass(frozen=True, kw_only=True)
class Deferrable:
    """A module's parameters by when their gradients come: found once, for all microbatches.

    ``layers`` may put theirs off; ``leaves`` are parameters that the first part asks autograd for: all whose gradient
    comes then, or is put off by an autograd function, which says that it has none.
    """

    layers: tuple[Deferring, ...]
    leaves: tuple[nn.Parameter, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Deferrable:
        layers = tuple(layer for layer in module.modules() if isinstance(layer, Deferring))
        late = {id(weight) for layer in layers if layer.noted for weight in layer.parameters(recurse=False)}
        return cls(layers=layers, leaves=tuple(p for p in module.parameters() if id(p) not in late))


class WeightGradients:
    """Weight gradients that a backward pass puts off, of one stage and microbatch.

        queue = WeightGradients(Deferrable.of(stage))
        with queue.collect():
            output = stage(x)
        ...
        x_gradient = queue.backward(output, gradient, x)   # no linear layer's weight has a gradient yet
        ...
        queue.run()                                        # weight.grad is what plain backward would have left

    Any number of queues may be filled before the first runs. What gradients are computed from stays in memory until
    then. Parameters' hooks do not fire: what waits for complete gradients has to go by the callback of ``run``.
    """

    def __init__(self, parts: Deferrable) -> None:
        self._parts = parts
        self._products: list[tuple[Tensor, Tensor, Any]] = []  # weight, input, autograd's node
        self._entries: deque[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def collect(self) -> Iterator[WeightGradients]:
        """Around forward: the gradients of what the layers compute inside the block are this queue's."""
        if any(layer.queue is not None for layer in self._parts.layers):
            raise UnsupportedError("another queue collects these weight gradients: leave its block first")
        self._set(self)
        try:
            yield self
        finally:
            self._set(None)

    def _set(self, queue: WeightGradients | None) -> None:
        """As ``layer.queue = queue``, past what ``nn.Module`` asks of all that it is given."""
        for layer in self._parts.layers:
            vars(layer)["queue"] = queue

    def note(self, weight: Tensor, x: Tensor, y: Tensor) -> None:
        """``y`` = ``x`` ``weight``^T is torch's own product, in a forward pass."""
        if weight.requires_grad and y.grad_fn is not None:
            _check_leaf(weight)
            self._products.append((weight, x, y.grad_fn))

    def put(self, weight: Tensor, grad: Tensor, gradient: Callable[[Tensor], Tensor]) -> None:
        """Puts off adding ``gradient(grad)`` to ``weight.grad``, in a backward pass that has come to ``grad``."""
        _check_leaf(weight)
        self._entries.append((weight, grad, gradient))

    def backward(
        self, output: Tensor, gradient: Tensor | None = None, x: Tensor | None = None
    ) -> Tensor | None:
        """The first part: returns the gradient of ``x``, adds the leaves' to theirs, and puts off what it has noted.

        ``gradient`` is that of ``output`` (None for a scalar). ``x``: a leaf that the output was computed from.
        """
        products, self._products = self._products[::-1], []
        inputs = [] if x is None else [x]
        leaves = [leaf for leaf in self._parts.leaves if leaf.requires_grad]
        edges = [GradientEdge(node, 0) for *_, node in products]
        found = torch.autograd.grad(output, [*inputs, *leaves, *edges], gradient, allow_unused=True)
        of_edges = found[len(inputs) + len(leaves) :]
        for (weight, source, _), grad in zip(products, of_edges, strict=True):
            if grad is not None:
                self.put(weight, grad, partial(weight_gradient, x=source.detach(), dtype=weight.dtype))
        self._accumulate(leaves, found[len(inputs) :][: len(leaves)], kept=[gradient, *found[: len(inputs)]])
        return found[0] if inputs else None

    def _accumulate(
        self, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None], kept: Sequence[Tensor | None]
    ) -> None:
        """The first gradient of a leaf is added to by others later: one that is read elsewhere too is copied."""
        pairs = [(leaf, grad) for leaf, grad in zip(leaves, gradients, strict=True) if grad is not None]
        owners: Counter[int] = Counter()
        if any(leaf.grad is None for leaf, _ in pairs):
            late = [grad for _, grad, _ in self._entries]
            every = [grad for grad in (*gradients, *kept, *late) if grad is not None]
            owners.update(grad.untyped_storage().data_ptr() for grad in every)
        with torch.no_grad():
            for leaf, grad in pairs:
                alone = grad.is_contiguous() and owners[grad.untyped_storage().data_ptr()] == 1
                copied = leaf.grad is None and not alone
                _add(leaf, grad.clone(memory_format=torch.contiguous_format) if copied else grad)

    def run(self, done: Callable[[Tensor], None] | None = None) -> None:
        """The second part: computes and adds everything in the order it was put off, and forgets it.

        ``done(weight)`` is called when all of this queue's gradients of a weight are in ``weight.grad``.
        """
        entries = self._entries
        left = Counter(id(weight) for weight, *_ in entries)
        with torch.no_grad(), without_autocast(entries[0][0]) if entries else nullcontext():
            while entries:
                weight, grad, gradient = entries.popleft()
                _add(weight, gradient(grad))
                left[id(weight)] -= 1
                if done is not None and not left[id(weight)]:
                    done(weight)


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of y = x W^T: grad [..., out] and x [..., in] -> [out, in]."""
    if grad.dim() != 2:
        rows = math.prod(grad.shape[:-1])
        grad, x = grad.reshape(rows, grad.shape[-1]), x.reshape(rows, x.shape[-1])
    return (grad.T @ x).to(dtype)


def _add(leaf: Tensor, gradient: Tensor) -> None:
    leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)


def _check_leaf(weight: Tensor) -> None:
    if not weight.is_leaf:
        raise UnsupportedError(
            "a weight that is computed from others has no .grad to add to: it cannot be put off"
        )
