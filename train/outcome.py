"""What a run did, and where its time went: the trainer fills it in, the report shows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from train.evaluate import Metrics

__all__ = ["Outcome", "StepTimes"]


@dataclass(kw_only=True)
class StepTimes:
    """Seconds summed over steps, of one rank; backward without the exposed communication at its end.

    ``waiting``: for other stages of the pipeline, in bubbles or because a message took longer than computation.
    ``tensor``: for the ranks that share layers. ``exposed``: for buckets, and what is summed behind them.
    """

    forward: float = 0.0
    backward: float = 0.0
    waiting: float = 0.0
    tensor: float = 0.0
    exposed: float = 0.0
    optimizer: float = 0.0
    other: float = 0.0
    total: float = 0.0

    @property
    def known(self) -> float:
        """All but ``other``."""
        return self.forward + self.backward + self.waiting + self.tensor + self.exposed + self.optimizer


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
