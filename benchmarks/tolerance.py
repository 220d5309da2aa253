"""How far apart the losses of two computations in fp32 may be."""

from __future__ import annotations

import torch

from model.config import ModelConfig

__all__ = ["loss_tolerance"]


def loss_tolerance(config: ModelConfig, *, items: int, predictions: int, loss: float) -> float:
    """Between a mean loss in fp32 and the exact one, by the number n of roundings in the longest chain.

    A chain goes through all blocks (dot products over the channels, a row's tokens and the hidden channels), the
    scores, and the sums over items and predictions. Roundings mostly cancel, so the bound grows with the square root
    of n (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, with lambda = 8).
    """
    block = 3 * config.dim + config.hidden + config.max_len + config.dim // config.heads
    chain = config.layers * block + config.dim + items + predictions
    unit = torch.finfo(torch.float32).eps / 2
    return 8 * chain**0.5 * unit / (1 - chain * unit) * abs(loss)
