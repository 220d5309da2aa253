"""What a run tells: progress while it goes, a table at its end, and ``metrics.jsonl`` for programs.

Rank 0 reports; the others hold a Reporter that says nothing. Lines are plain when the output is not a
terminal.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from train.config import TrainConfig
from train.errors import ConfigError

if TYPE_CHECKING:
    from train.evaluate import Metrics
    from train.outcome import Outcome

__all__ = ["Reporter", "final_table", "refuse_used", "summary"]


class Reporter:
    """Progress and metrics of one run; silent and without files unless ``active``."""

    def __init__(self, config: TrainConfig, run_dir: Path | None, *, active: bool) -> None:
        self.console = Console(quiet=not active, highlight=False, soft_wrap=not _is_terminal())
        self._active = active
        self._begin = time.perf_counter()
        self._file: TextIO | None = None
        self._progress: Progress | None = None
        if active and run_dir is not None:
            self._file = _open_run(run_dir, config)

    def line(self, text: str) -> None:
        """One line (or block) of text."""
        self.console.print(text, markup=False)

    def event(self, kind: str, **values: Any) -> None:
        """One line of metrics.jsonl; ``seconds`` count from the start of this process's run."""
        if self._file is not None:
            values = {"event": kind, "seconds": round(time.perf_counter() - self._begin, 4), **values}
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def started(self, description: str, total_steps: int) -> None:
        """Training begins: says what is active."""
        self.line(description)
        self.event("start", total_steps=total_steps, communication=description)
        if self._active and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._task = self._progress.add_task("training", total=total_steps)
            self._progress.start()

    def stepped(self, step: int, seconds: float) -> None:
        """An optimizer step ended."""
        if self._file is not None:
            self._file.write(f'{{"event": "step", "step": {step}, "step_seconds": {seconds:.6f}}}\n')
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def validated(self, epoch: int, outcome: Outcome, metrics: Metrics) -> None:
        """A validation ended; ``outcome.loss`` is the training loss since the one before."""
        self.event(
            "validation", epoch=epoch, step=outcome.steps, loss=outcome.loss, hr=metrics.hr, ndcg=metrics.ndcg
        )
        elapsed = time.perf_counter() - self._begin
        self.line(
            f"epoch {epoch:3d}  step {outcome.steps:5d}  loss {outcome.loss:.4f} nats  "
            f"validation HR@10 {metrics.hr:.4f}  NDCG@10 {metrics.ndcg:.4f}  {elapsed:5.1f} s"
        )

    def close(self) -> None:
        """Ends the progress bar and the file."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._file is not None:
            self._file.close()
            self._file = None


def _is_terminal() -> bool:
    return Console().is_terminal


def refuse_used(run_dir: Path) -> None:
    """Raises ConfigError if the directory holds the metrics of another run: nothing is overwritten."""
    if (run_dir / "metrics.jsonl").exists():
        raise ConfigError(f"--run-dir {run_dir}: holds the metrics of another run; choose a new directory")


def _open_run(run_dir: Path, config: TrainConfig) -> TextIO:
    refuse_used(run_dir)
    path = run_dir / "metrics.jsonl"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("x", encoding="utf-8")
        (run_dir / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--run-dir {run_dir}: {error.strerror}") from None
    return file


_TIMES = {
    "forward": "forward",
    "backward": "backward",
    "waiting": "waiting for stages",
    "tensor": "waiting for shares of layers",
    "exposed": "exposed communication",
    "optimizer": "optimizer",
    "other": "other",
}
"""The parts of a step's time (`StepTimes`), and how people are told of them."""


def summary(
    outcome: Outcome, popularity: Metrics, best_ndcg: float | None, wire: int | None, dense: int | None
) -> dict[str, Any]:
    """The final figures by name; ``wire`` and ``dense`` are bytes between nodes per step, over all ranks."""
    times, test = outcome.times, outcome.test
    assert test is not None  # noqa: S101 (run() has ended)
    shares = {name: getattr(times, name) for name in _TIMES}
    return {
        "loss": outcome.loss,
        "hr": test.hr,
        "ndcg": test.ndcg,
        "validation_ndcg": outcome.validation.ndcg if outcome.validation else None,
        "best_epoch": outcome.best_epoch,
        "popularity_hr": popularity.hr,
        "popularity_ndcg": popularity.ndcg,
        "best_reachable_ndcg": best_ndcg,
        "users": test.users,
        "steps": outcome.steps,
        "skipped_steps": outcome.skipped,
        "samples_per_second": outcome.samples / times.total,
        "step_seconds": times.total / outcome.steps,
        "wire_nbytes_per_step": wire,
        "dense_wire_nbytes_per_step": dense,
        "wire_ratio": dense / wire if dense and wire else None,
        **{f"{name}_share": value / times.total for name, value in shares.items()},
    }


def final_table(values: dict[str, Any]) -> Table:
    """The summary as a table for people."""
    table = Table(title="result on the test items (full ranking, history excluded)", title_justify="left")
    for name in ("figure", "this run", "to compare with"):
        table.add_column(name)
    table.add_row("training loss", f"{values['loss']:.4f} nats", "")
    table.add_row("HR@10", f"{values['hr']:.4f}", f"popularity {values['popularity_hr']:.4f}")
    table.add_row("NDCG@10", f"{values['ndcg']:.4f}", _ndcg_peers(values))
    table.add_row(
        "throughput",
        f"{values['samples_per_second']:.0f} samples/s",
        f"{1e3 * values['step_seconds']:.1f} ms/step",
    )
    table.add_row("between nodes", *_wire(values))
    shares = ", ".join(f"{label} {100 * values[f'{name}_share']:.0f} %" for name, label in _TIMES.items())
    table.add_row("step time", shares, f"{values['steps']} steps, {values['skipped_steps']} skipped")
    return table


def _ndcg_peers(values: dict[str, Any]) -> str:
    ratio = f" ({values['ndcg'] / values['popularity_ndcg']:.1f}x)" if values["popularity_ndcg"] else ""
    text = f"popularity {values['popularity_ndcg']:.4f}{ratio}"
    best = values["best_reachable_ndcg"]
    return (
        text if best is None else f"{text}; best reachable {best:.4f} ({100 * values['ndcg'] / best:.0f} %)"
    )


def _wire(values: dict[str, Any]) -> tuple[str, str]:
    wire, dense = values["wire_nbytes_per_step"], values["dense_wire_nbytes_per_step"]
    if wire is None:
        return "not counted", ""
    if not wire:
        return "no gradients", ""
    return f"{wire / 1e6:.4f} MB/step", f"dense {dense / 1e6:.4f} MB/step ({values['wire_ratio']:.1f}x)"
