"""Reads what a training run leaves in its directory: ``metrics.jsonl``, one JSON object a line."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["TrainingRun"]


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A finished run: its ``final`` event, and the seconds of every step."""

    final: dict[str, Any]
    step_seconds: list[float]

    @classmethod
    def read(cls, run_dir: Path) -> TrainingRun | None:
        """The run in a directory; None when there is none, or it has not finished."""
        try:
            lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            events = [json.loads(line) for line in lines if line]
        except (OSError, json.JSONDecodeError):  # none yet, or cut off in the middle of a line
            return None
        final = next((event for event in events if event["event"] == "final"), None)
        steps = [event["step_seconds"] for event in events if event["event"] == "step"]
        return cls(final=final, step_seconds=steps) if final is not None else None

    @property
    def step_ms(self) -> float:
        """Median of the steps' times without the first tenth, in ms."""
        return statistics.median(self.step_seconds[len(self.step_seconds) // 10 :]) * 1e3

    @property
    def exposed_ms(self) -> float:
        """Mean exposed communication of a step, in ms."""
        return float(self.final["exposed_share"] * self.final["step_seconds"]) * 1e3
