"""What a run did, and where its time went: the trainer fills it in, the report shows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from train.evaluate import Metrics

__all__ = ["Outcome", "StepTimes"]


@dataclass(kw_only=True)
class StepTimes:
    """Seconds summed over steps, of one rank; backward without the exposed communication at its end."""

    forward: float = 0.0
    backward: float = 0.0
    exposed: float = 0.0
    optimizer: float = 0.0
    other: float = 0.0
    total: float = 0.0


@dataclass(kw_only=True)
class Outcome:
    """What a run did; times are of this rank, counts are global."""

    steps: int = 0
    skipped: int = 0
    samples: int = 0
    loss: float = float("nan")
    validation: Metrics | None = None
    best_epoch: int = 0
    test: Metrics | None = None
    times: StepTimes = field(default_factory=StepTimes)
