"""What the instructions of a schedule cost: measured or modelled figures, always arguments, never constants."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from train.errors import ScheduleError
from train.pipeline.instructions import Instruction, PipelineSchedule

__all__ = ["Costs", "HeadCost", "StageCost"]


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """A stage: s of F, I and W per microbatch, bytes that it hands on, s of the sum of each of its buckets.

    ``backward``: s of B, where that is not I and W one after the other (it recomputes or loads less).
    ``nbytes``: of the output for one microbatch; its gradient has as many. ``ready``: by which part of the stage's last
    W or B each bucket's gradients are complete, from 0 to 1; empty: with its end.
    """

    forward: float
    input_grad: float
    weight_grad: float
    backward: float | None = None
    nbytes: int = 0
    reduce: tuple[float, ...] = ()
    ready: tuple[float, ...] = ()

    def seconds(self, op: str) -> float:
        if op == "B" and self.backward is not None:
            return self.backward
        return {
            "F": self.forward,
            "I": self.input_grad,
            "W": self.weight_grad,
            "B": self.input_grad + self.weight_grad,
        }[op]


@dataclass(frozen=True, kw_only=True)
class HeadCost:
    """A rank's shard of the head: s of HEAD_S and HEAD_T per microbatch, bytes of what HEAD_C moves.

    ``hidden_nbytes``: the last stage's output for one microbatch; ``part_nbytes``: what the shard sends of its gradient
    (None: as much); ``statistics_nbytes``: largest score, sum and target's score of each token. ``reduce`` and
    ``ready``: as for a stage.
    """

    score: float
    weight_grad: float
    hidden_nbytes: int = 0
    statistics_nbytes: int = 0
    part_nbytes: int | None = None
    reduce: tuple[float, ...] = ()
    ready: tuple[float, ...] = ()

    @property
    def sends(self) -> int:
        """Bytes of its part of the hidden states' gradient."""
        return self.hidden_nbytes if self.part_nbytes is None else self.part_nbytes

    def seconds(self, op: str) -> float:
        return self.score if op == "HEAD_S" else self.weight_grad


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of all ``stages``, and of each rank's shard of a split head (``heads[rank]``).

    ``sizes[microbatch]``: how large a microbatch is beside a whole one, where they differ (times s, not bytes).
    """

    stages: tuple[StageCost, ...]
    heads: tuple[HeadCost, ...] = ()
    sizes: tuple[float, ...] = ()

    @classmethod
    def unit(cls, schedule: PipelineSchedule) -> Costs:
        """One second for each of F, I, W, HEAD_S and HEAD_T, two for B; nothing for what is sent."""
        stage = StageCost(forward=1.0, input_grad=1.0, weight_grad=1.0)
        heads = (HeadCost(score=1.0, weight_grad=1.0),) * (schedule.ranks if schedule.split_head else 0)
        return cls(stages=(stage,) * schedule.stages, heads=heads)

    def check(self, schedule: PipelineSchedule) -> None:
        """Raises `ScheduleError` unless these are figures for ``schedule``."""
        heads = schedule.ranks if schedule.split_head else 0
        if (len(self.stages), len(self.heads)) != (schedule.stages, heads):
            raise ScheduleError(
                f"costs of {len(self.stages)} stages and {len(self.heads)} shards of the head; schedule "
                f"{schedule.name} has {schedule.stages} and {heads}"
            )
        if self.sizes and len(self.sizes) != schedule.microbatches:
            raise ScheduleError(f"{len(self.sizes)} sizes for {schedule.microbatches} microbatches")
        every: tuple[StageCost | HeadCost, ...] = (*self.stages, *self.heads)
        for stage, cost in enumerate(every):
            counts = schedule.buckets[min(stage, schedule.head)] if schedule.buckets else 0
            if cost.reduce and len(cost.reduce) != counts:
                raise ScheduleError(f"{cost}: {len(cost.reduce)} sums for {counts} buckets")
            if cost.ready and (len(cost.ready) != counts or max(cost.ready) > 1):
                raise ScheduleError(f"{cost}: ready= wants a part of 1 for each of {counts} buckets")
        values = [value for cost in every for value in _figures(cost)]
        if not all(0 <= value < float("inf") for value in (*values, *self.sizes)):
            raise ScheduleError(f"{self}: costs are finite numbers >= 0")

    def of(self, entry: Instruction, rank: int) -> StageCost | HeadCost:
        """Figures of the stage that ``entry`` is about, or of the rank's shard of the head."""
        return self.stages[entry.stage] if entry.stage < len(self.stages) else self.heads[rank]

    def seconds(self, entry: Instruction, rank: int) -> float:
        """Of a computation, or of a bucket's sum."""
        cost = self.of(entry, rank)
        if entry.op == "REDUCE":
            return cost.reduce[entry.bucket] if cost.reduce else 0.0
        return cost.seconds(entry.op) * (self.sizes[entry.microbatch] if self.sizes else 1.0)


def _figures(cost: StageCost | HeadCost) -> Iterable[float]:
    for value in (getattr(cost, name) for name in cost.__dataclass_fields__):
        yield from value if isinstance(value, tuple) else () if value is None else (value,)
