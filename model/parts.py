"""Which contiguous part of the recommender a pipeline stage is, and how a model is cut into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridcomm.errors import UnsupportedError

__all__ = ["Part", "cut", "split"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """The blocks ``layers``; before them the embedding if it ``embeds``, behind them the head if it ``scores``."""

    layers: range
    embeds: bool = False
    scores: bool = False

    @classmethod
    def whole(cls, layers: int) -> Part:
        return cls(layers=range(layers), embeds=True, scores=True)

    def check(self, layers: int) -> None:
        """Raises `UnsupportedError` unless this is a part of a model of so many layers."""
        begin, end = self.layers.start, self.layers.stop
        if not (self.layers.step == 1 and 0 <= begin <= end <= layers):
            raise UnsupportedError(f"{self}: a part has contiguous layers of 0..{layers - 1}")
        if (self.embeds and begin != 0) or (self.scores and end != layers):
            raise UnsupportedError(
                f"{self}: the embedding stands before layer 0, the head behind layer {layers - 1}"
            )
        if not (self.layers or self.embeds or self.scores):
            raise UnsupportedError(f"{self}: a part without layers, embedding and head does nothing")

    def __str__(self) -> str:
        names = ["embedding"] * self.embeds
        if len(self.layers) == 1:
            names.append(f"layer {self.layers.start}")
        elif self.layers:
            names.append(f"layers {self.layers.start}-{self.layers.stop - 1}")
        return " + ".join(names + ["head"] * self.scores)


def split(
    layers: int, stages: int, *, embedding: float = 0.0, head: float = 1.0, speeds: Sequence[float] = ()
) -> tuple[Part, ...]:
    """Cuts a model into ``stages`` parts whose slowest takes as little time as can be.

    ``embedding`` and ``head`` say what they cost beside a layer, ``speeds[stage]`` how fast its rank is beside the
    others (default: alike). No layer is ever dropped: the parts are the whole model, in order. Of several best cuts
    the one with the smallest sum of squares is taken, then the one that gives earlier stages more. Raises
    `UnsupportedError` where there are more stages than things to share out.
    """
    rates = tuple(speeds) or (1.0,) * stages
    if stages < 1 or len(rates) != stages or min(rates) <= 0:
        raise UnsupportedError(f"{stages} stages with speeds {rates}: give each stage one speed above 0")
    units = [embedding, *[1.0] * layers, head]
    if len(units) < stages:
        raise UnsupportedError(
            f"{layers} layers, embedding and head cannot be shared out over {stages} stages: use at most {len(units)}"
        )
    prefix = [0.0]
    for cost in units:
        prefix.append(prefix[-1] + cost)
    # best[end]: (slowest, sum of squares, cuts from the last to the first) of the units before ``end``.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage, rate in enumerate(rates):
        reached: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for end in range(stage + 1, len(units) - (stages - stage - 1) + 1):
            options = []
            for begin, (slowest, squares, cuts) in best.items():
                if begin < end:
                    cost = (prefix[end] - prefix[begin]) / rate
                    options.append((max(slowest, cost), squares + cost * cost, (-begin, *cuts)))
            reached[end] = min(options)
        best = reached
    return cut(layers, [-begin for begin in reversed(best[len(units)][2])])


def cut(layers: int, starts: Sequence[int]) -> tuple[Part, ...]:
    """The parts that begin at ``starts`` (ascending, the first 0) of embedding, layers 0 .. and head, in that order."""
    ends = [*starts[1:], layers + 2]
    if not starts or starts[0] != 0 or any(begin >= end for begin, end in zip(starts, ends, strict=True)):
        raise UnsupportedError(
            f"starts {list(starts)}: ascending from 0 to {layers + 1}, where the head is, so that no part is empty"
        )
    return tuple(_part(begin, end, layers) for begin, end in zip(starts, ends, strict=True))


def _part(begin: int, end: int, layers: int) -> Part:
    """Of the units [begin, end), of which the first is the embedding and the last the head."""
    first = max(begin - 1, 0)
    return Part(
        layers=range(first, max(first, min(end - 1, layers))), embeds=begin == 0, scores=end == layers + 2
    )
