"""The second part of a backward pass, put off: weight gradients in queues that are run when there is time.

Zero-bubble pipelines (arXiv 2401.10241) send a stage's input gradient off as soon as it is there, and fill
waits with the weights'.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hybridcomm.errors import UnsupportedError
from model.tensor_parallel import without_autocast

__all__ = ["Deferring", "WeightGradients", "never_defer"]


class Deferring(nn.Module):
    """A layer that asks ``queue`` in backward, if there is one, to take its weight's gradient.

    ``defers``: it may be asked to. Without that, layers that nobody shares are torch's own products, which are quicker
    to call.
    """

    queue: WeightGradients | None = None
    defers: bool = True


def never_defer(module: nn.Module) -> None:
    """Says of all layers of ``module`` that no queue will collect: backward is one piece. Before the first forward."""
    for layer in module.modules():
        if isinstance(layer, Deferring):
            layer.defers = False


class WeightGradients:
    """Weight gradients that a backward pass has put off, of one stage and microbatch.

        queue = WeightGradients()
        with queue.collect(stage):
            output.backward(gradient)     # the input's gradient is complete, no linear layer's weight gradient is
        ...
        queue.run()                       # weight.grad is what plain backward would have left, bit for bit

    Any number of queues may be filled before the first runs. What gradients are computed from stays in memory until
    then. torch fires the parameters' hooks in backward all the same, where nothing has been added yet: what waits
    for complete gradients has to go by the callback of ``run``.
    """

    def __init__(self) -> None:
        self._entries: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def collect(self, module: nn.Module) -> Iterator[WeightGradients]:
        """Takes the weight gradients of all `Deferring` layers of ``module`` in backward passes inside the block."""
        layers = [layer for layer in module.modules() if isinstance(layer, Deferring)]
        if any(layer.queue is not None for layer in layers):
            raise UnsupportedError("another queue collects these weight gradients: leave its block first")
        if not all(layer.defers for layer in layers):
            raise UnsupportedError(
                "these layers were told that they never defer: nothing of them can be put off"
            )
        for layer in layers:
            layer.queue = self
        try:
            yield self
        finally:
            for layer in layers:
                layer.queue = None

    def put(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Puts off adding ``gradient()`` to ``weight.grad``."""
        if not weight.is_leaf:
            raise UnsupportedError(
                "a weight that is computed from others has no .grad to add to: it cannot be put off"
            )
        self._entries.append((weight, gradient))

    def run(self, done: Callable[[Tensor], None] | None = None) -> None:
        """Computes and adds everything in the order it was put off, and forgets it.

        ``done(weight)`` is called when all of this queue's gradients of a weight are in ``weight.grad``.
        """
        left = Counter(id(weight) for weight, _ in self._entries)
        while self._entries:
            weight, gradient = self._entries.popleft()
            with torch.no_grad(), without_autocast(weight):
                new = gradient()
                weight.grad = new if weight.grad is None else weight.grad.add_(new)
            left[id(weight)] -= 1
            if done is not None and not left[id(weight)]:
                done(weight)
