"""What embedding and head cost beside a layer, in multiply-adds, and the cut of a model that is fastest by that."""

from __future__ import annotations

from collections.abc import Sequence

from model.parts import Part, cut, split
from train.pipeline import Costs, PipelineSchedule, StageCost, make_schedule, simulate
from train.replica import ModelSpec

__all__ = ["best_parts", "relative_costs", "stage_costs"]

_ROW = 64  # tokens of a row, which attention looks at
_TOKENS = 512  # of a microbatch, among which the projection of all items' text is shared out
_AGAIN = 4 / 3  # what is computed once more in backward: the head's scores, checkpointed layers
_LEAST = 1e-3  # of a layer: a stage takes some time, and the simulation that orders a split head asks for it


def relative_costs(spec: ModelSpec) -> tuple[float, float]:
    """(embedding, head), where a layer is 1: forward and backward for a token."""
    config = spec.config
    layer = 4 * config.dim**2 + 3 * config.dim * config.hidden + 2 * _ROW * config.dim
    layer *= _AGAIN if spec.computing.checkpoint else 1
    text = 0.0
    if spec.features is not None and config.text:
        text = spec.num_items * spec.features.shape[1] * config.dim / _TOKENS
    head = _AGAIN * config.dim * (spec.negatives or spec.num_items) + (text if config.tied else 0.0)
    return text / layer, head / layer


def stage_costs(parts: Sequence[Part], *, embedding: float, head: float) -> Costs:
    """Of stages that are these parts, a layer's F, I and W being 1 each."""
    units = (max(_LEAST, len(part.layers) + embedding * part.embeds + head * part.scores) for part in parts)
    return Costs(stages=tuple(StageCost(forward=u, input_grad=u, weight_grad=u) for u in units))


def best_parts(schedule: PipelineSchedule, layers: int, *, embedding: float, head: float) -> tuple[Part, ...]:
    """The cut with which ``schedule``, as generated, takes least time in the simulation.

    The slowest stage says little where a rank has several, and they are uneven: a V gives its first rank embedding and
    head. From the cut whose slowest stage is fastest, boundaries move by one as long as that helps. Equal
    arguments give equal parts, so ranks need not ask each other.
    """
    few = min(schedule.microbatches, 4 * schedule.ranks)  # more of them only repeat what is between
    chunks = schedule.stages // schedule.ranks
    lists = make_schedule(schedule.name, schedule.ranks, few, chunks=chunks)

    def seconds(starts: Sequence[int]) -> float:
        return simulate(lists, stage_costs(cut(layers, starts), embedding=embedding, head=head)).step_time

    starts = [_start(part, layers) for part in split(layers, schedule.stages, embedding=embedding, head=head)]
    best = seconds(starts)
    while True:
        ends = [*starts[1:], layers + 2]
        moves = [
            [*starts[:number], starts[number] + step, *starts[number + 1 :]]
            for number in range(1, len(starts))
            for step in (-1, 1)
            if starts[number - 1] < starts[number] + step < ends[number]
        ]
        found = min(((seconds(move), move) for move in moves), default=(best, starts))
        if found[0] >= best * (1 - 1e-9):
            return cut(layers, starts)
        best, starts = found


def _start(part: Part, layers: int) -> int:
    """Among embedding, layers and head."""
    if part.embeds:
        return 0
    return part.layers.start + 1 if part.layers else layers + 1
