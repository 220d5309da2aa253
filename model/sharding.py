"""Shards: which part of a weight a rank holds, and the way from whole weights to shards and back.

Every split, of heads, hidden channels, items or tokens, is `balanced`. A layer says in ``sharding`` which of its
own parameters are shards, and in ``partial`` which of them are whole on each rank but get a gradient that is this
rank's part of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from hybridcomm.errors import UnsupportedError

__all__ = [
    "Sharding",
    "balanced",
    "draw_whole",
    "join_states",
    "partial_parameters",
    "shard_state",
    "shardings",
]


def balanced(total: int, parts: int) -> tuple[int, ...]:
    """Sizes of ``parts`` contiguous parts of ``total`` that differ by at most one, the larger ones first; some are
    0 when there are more parts than things."""
    share, rest = divmod(total, parts)
    return tuple(share + (part < rest) for part in range(parts))


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """A weight split along ``dim``: rank r has ``sizes[r]`` of each of its ``sections`` equal sections.

    Sections are weights that share a matrix (query, key and value; gate and up): each of them is split.
    """

    dim: int
    sizes: tuple[int, ...]
    sections: int = 1

    @property
    def whole(self) -> int:
        """Length of the whole weight along ``dim``."""
        return self.sections * sum(self.sizes)

    def bounds(self, rank: int) -> tuple[int, int]:
        """Begin and end of the rank's part within a section."""
        ends = list(accumulate(self.sizes))
        return ends[rank] - self.sizes[rank], ends[rank]

    def take(self, whole: Tensor, rank: int) -> Tensor:
        """The rank's part of a whole weight, as memory of its own."""
        if whole.shape[self.dim] != self.whole:
            raise UnsupportedError(
                f"a weight of shape {tuple(whole.shape)} cannot be split as {self}: dimension {self.dim} must be "
                f"{self.whole} long"
            )
        begin, end = self.bounds(rank)
        sections = whole.unflatten(self.dim, (self.sections, sum(self.sizes)))
        part = sections.narrow(self.dim + 1, begin, end - begin).flatten(self.dim, self.dim + 1)
        return part.clone(memory_format=torch.contiguous_format)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole weight of all ranks' parts."""
        found = tuple(part.shape[self.dim] for part in parts)
        if found != tuple(self.sections * size for size in self.sizes):
            raise UnsupportedError(f"parts of {found} along dimension {self.dim} are not those of {self}")
        shape = [
            part.unflatten(self.dim, (self.sections, size))
            for part, size in zip(parts, self.sizes, strict=True)
        ]
        return torch.cat(shape, dim=self.dim + 1).flatten(self.dim, self.dim + 1)


def shardings(module: nn.Module) -> dict[str, Sharding]:
    """How each parameter of ``module`` that is a shard is split, by its name in the state dict."""
    return {name: sharding for prefix, layer in _layers(module) for name, sharding in _own(prefix, layer)}


def partial_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters whose gradient has to be summed over the tensor-parallel ranks after backward, by name.

    The order is that of the modules: the same on all ranks.
    """
    names = [
        f"{prefix}{name}"
        for prefix, layer in _layers(module)
        for name in sorted(getattr(layer, "partial", ()))
    ]
    return {name: module.get_parameter(name) for name in dict.fromkeys(names)}


def shard_state(state: Mapping[str, Tensor], module: nn.Module, rank: int) -> dict[str, Tensor]:
    """The rank's part of a whole state dict: what ``module``, built for it, loads."""
    split = shardings(module)
    return {name: split[name].take(value, rank) if name in split else value for name, value in state.items()}


def join_states(states: Sequence[Mapping[str, Tensor]], module: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of all ranks' parts; what is not split is rank 0's."""
    split = shardings(module)
    return {
        name: split[name].join([state[name] for state in states]) if name in split else value
        for name, value in states[0].items()
    }


def draw_whole(layer: nn.Module, name: str, draw: Callable[[Tensor], object], *, rank: int = 0) -> None:
    """Fills a parameter by ``draw(whole weight)``, of which this rank keeps its part.

    So the weights do not depend on the number of ranks; every rank must start from the same seed.
    """
    own: Tensor = getattr(layer, name)
    sharding: Sharding | None = getattr(layer, "sharding", {}).get(name)
    with torch.no_grad():
        if sharding is None or len(sharding.sizes) == 1:
            draw(own)
            return
        shape = list(own.shape)
        shape[sharding.dim] = sharding.whole
        whole = own.new_empty(shape)
        draw(whole)
        own.copy_(sharding.take(whole, rank))


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, layer in module.named_modules(remove_duplicate=False):
        yield f"{path}." if path else "", layer


def _own(prefix: str, layer: nn.Module) -> Iterator[tuple[str, Sharding]]:
    for name, sharding in getattr(layer, "sharding", {}).items():
        yield f"{prefix}{name}", sharding
