"""Dropout whose masks follow tokens: whichever rank, microbatch or packing computes a token drops the same of it.

Random numbers are counter-based (Salmon et al., SC 2011): an element's is a hash of its token's draw (64 bits that say
whose token it is and in which step), the layer, the place in the layer, and the channel. There is no state that ranks
have to keep in step and recomputation to restore, and a model that is cut up trains as the whole one does.

Hashes: of tokens the finalizer of SplitMix64 (Steele et al., OOPSLA 2014), of elements that of MurmurHash3 (Appleby)
without its last shift, which only concerns bits below those that decide. In integers that wrap: torch has no unsigned
ones to multiply.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridcomm.errors import UnsupportedError
from model.tensor_parallel import ALONE, TensorParallel

__all__ = ["AttentionDropout", "Dropout", "derive_draws", "fresh_draws"]


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


_GOLDEN = _signed(0x9E3779B97F4A7C15, 64)  # 2^64 / golden ratio, odd
_MIX_64 = _signed(0xBF58476D1CE4E5B9, 64), _signed(0x94D049BB133111EB, 64)
_MIX_32 = _signed(0x85EBCA6B, 32), _signed(0xC2B2AE35, 32)
_CHANNELS = -1  # a place where no dropout is: channels' numbers are no token's


def derive_draws(draws: Tensor, number: int) -> Tensor:
    """Tokens' draws for one of many uses of them: int64 -> int64 of the same shape; well mixed, whatever ``draws``."""
    z = draws + _signed(number * _GOLDEN % 2**64, 64)
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _MIX_64[0]
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _MIX_64[1]
    return z ^ (z >> 31 & (1 << 33) - 1)


def fresh_draws(like: Tensor, tp: TensorParallel = ALONE) -> Tensor:
    """Draws for tokens of which nobody says whose they are, from torch's generator: int64 of the shape of ``like``.

    Raises `UnsupportedError` where ranks share layers: they have to drop alike.
    """
    if tp.size > 1:
        raise UnsupportedError(
            "tensor-parallel ranks have to drop the same: give the model ``draws``, a number for each token"
        )
    first = torch.randint(2**62, (), device=like.device)
    return first + torch.arange(like.numel(), device=like.device).view(like.shape)


def _numbers(draws: Tensor, place: int) -> Tensor:
    """32 bits (int32) of each token's draw, for one place in a layer."""
    return (derive_draws(draws, place) >> 32).to(torch.int32)


def _keep(counters: Tensor, p: float) -> Tensor:
    """True with probability 1 - p, by a hash of each counter; int32 of any shape, which is overwritten."""
    z = counters
    z.bitwise_xor_((z >> 16).bitwise_and_(0xFFFF)).mul_(_MIX_32[0])
    z.bitwise_xor_((z >> 13).bitwise_and_(0x7FFFF)).mul_(_MIX_32[1])
    return z >= round(p * 2**32) - 2**31


class Dropout(nn.Module):
    """Zeroes elements with probability ``p`` and scales the rest by 1 / (1 - p), in training only.

    ``place``: one of its own for each dropout of a layer, from 0. ``channels``: how many a token has.
    """

    channels: Tensor

    def __init__(self, p: float, *, place: int, channels: int, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.p, self.place, self.tp = p, place, tp
        self._number(range(channels))

    def _number(self, channels: range) -> None:
        numbers = _numbers(torch.arange(channels.start, channels.stop), _CHANNELS)
        self.register_buffer("channels", numbers, persistent=False)

    @property
    def active(self) -> bool:
        return self.training and self.p > 0

    def forward(self, x: Tensor, draws: Tensor | None) -> Tensor:
        """x [B, T, C], draws int64 [B, T] of this layer -> [B, T, C]; [n, C], this rank's tokens of them, where ranks
        split them."""
        if not self.active:
            return x
        numbers = _numbers(_given(draws), self.place)
        if self.tp.sequence:
            numbers = numbers.flatten().split(self.tp.sizes(numbers.numel()))[self.tp.rank]
        return self._dropped(x, numbers[..., None] + self.channels)

    def _dropped(self, x: Tensor, counters: Tensor) -> Tensor:
        return x * _keep(counters, self.p).to(x.dtype).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}, place={self.place}"


class AttentionDropout(Dropout):
    """Likewise for attention's weights, of which each belongs to two tokens; ``heads``: those that this rank has.

    It takes two places, ``place`` and the one behind it.
    """

    def __init__(self, p: float, *, place: int, heads: range, tp: TensorParallel = ALONE) -> None:
        super().__init__(p, place=place, channels=0, tp=tp)
        self._number(heads)

    def forward(self, x: Tensor, draws: Tensor | None) -> Tensor:
        """x [B, H, T, T], by queries, then keys; draws int64 [B, T] -> the shape of x."""
        if not self.active:
            return x
        query, key = (_numbers(_given(draws), self.place + end) for end in (0, 1))
        counters = query[:, None, :, None] + self.channels[:, None, None]
        return self._dropped(x, counters + key[:, None, None, :])


def _given(draws: Tensor | None) -> Tensor:
    if draws is None:
        raise UnsupportedError("dropout in training needs ``draws``, a number for each token")
    return draws
