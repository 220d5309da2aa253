"""Errors of the training stack: what a user did (exit code 2) and what went wrong at run time (exit code
1)."""

from __future__ import annotations

__all__ = ["ConfigError", "DataError", "EvaluationError", "ScheduleError", "TrainError"]


class TrainError(Exception):
    """Base: shown to the user as one line, without a traceback."""

    exit_code = 1


class ConfigError(TrainError):
    """An unknown option, a value out of range, or a combination that cannot act."""

    exit_code = 2


class DataError(TrainError):
    """Missing or malformed data; the message names the file and, when there is one, the line."""


class EvaluationError(TrainError):
    """Scores that cannot be ranked, or users that were not counted exactly once."""


class ScheduleError(TrainError):
    """A pipeline schedule that would not run, or would compute something else; the message shows the step."""
