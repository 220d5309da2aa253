"""How a model may be cut into stages, and which of these cuts are worth running.

All cuts of a schedule are simulated with the measured costs of a layer and of the head, and the best few are run.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch

from benchmarks.parallel import plain
from benchmarks.parallel.case import Case
from model.parts import Part
from model.vocab import Items, item_loss
from train.pipeline import Costs, HeadCost, StageCost, lower, make_schedule, simulate

__all__ = ["Cut", "cuts", "parts_of", "promising", "unit_costs"]

Cut = tuple[int, ...]
"""Layers of each stage; the first also embeds, the last scores."""
_REPEATS = 5


def cuts(layers: int, stages: int) -> list[Cut]:
    """All there are: only the first and the last stage can do without layers."""
    inner = range(1, layers + 1)
    middle = itertools.product(inner, repeat=stages - 2)
    return [
        (first, *some, layers - first - sum(some))
        for some in middle
        for first in range(layers - sum(some) + 1)
    ]


def parts_of(cut: Cut) -> tuple[Part, ...]:
    ends = list(itertools.accumulate(cut))
    return tuple(
        Part(layers=range(end - count, end), embeds=stage == 0, scores=stage == len(cut) - 1)
        for stage, (count, end) in enumerate(zip(cut, ends, strict=True))
    )


def unit_costs(case: Case, *, tiles: bool) -> tuple[StageCost, StageCost]:
    """A layer's and the head's cost for a microbatch, on this rank while others measure too."""
    embedding, *blocks, head = plain.layers(case, tiles=tiles)
    batch = case.batches()[0]
    x = embedding(batch.items).detach()

    def loss(x: torch.Tensor) -> torch.Tensor:
        out = head(x)
        if tiles:
            return item_loss(out, head.table, batch.targets, Items(count=case.items))
        return torch.nn.functional.cross_entropy(out, batch.targets)

    return _timed(blocks[0], x), _timed(loss, x)


def _timed(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> StageCost:
    forward, backward = [], []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        out = call(x.clone().requires_grad_())
        middle = time.perf_counter()
        out.sum().backward()
        forward.append(middle - begin)
        backward.append(time.perf_counter() - middle)
    half = min(backward) / 2
    return StageCost(forward=min(forward), input_grad=half, weight_grad=half)


def promising(case: Case, schedule: str, units: tuple[StageCost, StageCost], *, count: int) -> list[Cut]:
    """The cuts of a schedule on two ranks that are to be run, best first by simulation; ``schedule`` as of
    `benchmarks.parallel.ours.pipeline`."""
    name, _, split = schedule.partition(", ")
    made = lower(make_schedule(name, 2, case.microbatches), head=bool(split))
    every = cuts(case.layers, made.stages)
    seconds = {cut: simulate(made, _costs(cut, units, split=bool(split))).step_time for cut in every}
    ranked = sorted(every, key=seconds.__getitem__)
    return ranked[:count]


def _costs(cut: Cut, units: tuple[StageCost, StageCost], *, split: bool) -> Costs:
    """A split head makes its part of the hidden states' gradient together with the scores."""
    layer, head = units
    scores = (0,) * len(cut) if split else (*(0,) * (len(cut) - 1), 1)
    stages = tuple(
        StageCost(
            **{
                name: layers * getattr(layer, name) + score * getattr(head, name)
                for name in ("forward", "input_grad", "weight_grad")
            }
        )
        for layers, score in zip(cut, scores, strict=True)
    )
    shard = HeadCost(score=(head.forward + head.input_grad) / 2, weight_grad=head.weight_grad / 2)
    return Costs(stages=stages, heads=(shard, shard) if split else ())
