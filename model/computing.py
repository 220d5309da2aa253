"""How a model's layers are computed: options that trade memory, time and digits, and leave weights and names alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

__all__ = ["PLAIN", "Computing"]


@dataclass(frozen=True, kw_only=True)
class Computing:
    """``autocast``: what products of blocks and of text are computed in, under ``torch.autocast``; weights, the
    residual stream, the loss and all sums of gradients stay as they are. ``checkpoint``: each block keeps its input
    alone for backward, which computes the block again. ``compile``: the ``torch.compile`` backend for each block, or
    None.
    """

    autocast: Literal["none", "bf16"] = "none"
    checkpoint: bool = False
    compile: str | None = None

    def describe(self) -> str:
        """What is active, to be put behind other facts; empty where nothing is."""
        active = [
            *(["autocast to bf16"] if self.autocast == "bf16" else []),
            *(["checkpointed"] if self.checkpoint else []),
            *([f"compiled by {self.compile}"] if self.compile else []),
        ]
        return f"; blocks {', '.join(active)}" if active else ""

    def prepare(self, block: nn.Module) -> None:
        """Once, when a block is made. Collectives, and linear layers that may put gradients off, break its graphs."""
        if self.compile is not None:
            block.compile(backend=self.compile)

    def precision(self, x: Tensor) -> AbstractContextManager[Any]:
        """Around all that is computed in autocast's dtype, on the device of ``x``."""
        import torch

        return nullcontext() if self.autocast == "none" else torch.autocast(x.device.type, torch.bfloat16)

    def run(self, block: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
        """``block(x, *others)``, of which backward may keep less: nothing in a block draws from a generator."""
        import torch

        if not (self.checkpoint and torch.is_grad_enabled()):
            return block(x, *others)
        from torch.utils.checkpoint import checkpoint

        return checkpoint(block, x, *others, use_reentrant=False, preserve_rng_state=False)


PLAIN = Computing()
"""Layers as they are written."""
