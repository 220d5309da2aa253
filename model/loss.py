"""Next-item loss: full softmax over all items."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["next_item_loss"]


def next_item_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Sum over predictions of the cross-entropy, in nats; scores [N, V] floating, targets [N] int64 ->
    scalar.

    A sum and not a mean: the caller divides once by the global number of predictions, so that the
    gradient of a ragged batch over any number of ranks is that of one process (a mean of means is not).
    """
    return F.cross_entropy(scores, targets, reduction="sum")
