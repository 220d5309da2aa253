"""Does cutting the model up cost quality? One process against TP 2 x PP 2 x DP 2 on real data, in fp32.

``python -m benchmarks.studies.parallel_quality --data DIR --seeds 5``. Both of a pair have the same initial weights,
order of users and dropout masks; sums are in another order. Two questions, one table:

1. The loss of the first step, without dropout, is the same but for rounding (`benchmarks.tolerance`).
2. NDCG@10 at the end differs by less than seeds do: the mean paired difference lies within the standard deviation of
   one process over the seeds.

Eight ranks run as two virtual nodes, uncompressed. Runs are kept under ``--out``; finished ones are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.runs import TrainingRun
from benchmarks.studies.quality import Study, StudyError
from benchmarks.studies.statistics import PairedDifference
from benchmarks.table import table
from benchmarks.tolerance import loss_tolerance
from model.config import ModelConfig
from train.data import load_directory

__all__ = ["ParallelStudy", "main", "summarise"]

_ARMS = {
    "alone": ["--nproc", "1", "--nodes", "1"],
    "hybrid": ["--nproc", "8", "--nodes", "2", "--tp", "2", "--pp", "2"],
}


@dataclass(frozen=True, kw_only=True)
class ParallelStudy(Study):
    """``schedule``: of the pipeline. ``steps``: stop after so many (0: never); the first step alone has no dropout."""

    schedule: str = "auto"
    steps: int = 0

    def arm(self, arm: str) -> list[str]:
        options = [*_ARMS[arm], "--compress", "none"]
        if arm == "hybrid" and self.schedule != "auto":
            options += ["--schedule", self.schedule]
        if self.steps == 1:
            options += ["--model.dropout", "0"]
        return [*options, "--max-steps", str(self.steps)] if self.steps else options

    def first_step(self) -> ParallelStudy:
        """The same in a folder of its own, for one step."""
        return replace(self, out=self.out / "first-step", steps=1)

    def pair(self, seed: int) -> dict[str, TrainingRun]:
        """Both arms of a seed."""
        return {arm: self.run(arm, seed) for arm in _ARMS}

    def tolerance(self, loss: float) -> float:
        """Of the first step's loss, as its run was configured."""
        config = json.loads((self.out / "alone-seed0" / "config.json").read_text(encoding="utf-8"))
        model = ModelConfig.model_validate(config["model"])
        predictions = config["batch_size"] * model.max_len  # at most
        return loss_tolerance(
            model, items=load_directory(self.data).num_items, predictions=predictions, loss=loss
        )


def summarise(
    pairs: list[dict[str, TrainingRun]], first: dict[str, float], tolerance: float
) -> dict[str, Any]:
    """Both questions' figures and answers."""
    ndcg = {arm: [pair[arm].final["ndcg"] for pair in pairs] for arm in _ARMS}
    paired = PairedDifference.of(ndcg["alone"], ndcg["hybrid"])
    spread = statistics.stdev(ndcg["alone"])
    return {
        "seeds": len(pairs),
        "first_loss": first,
        "first_difference": abs(first["hybrid"] - first["alone"]),
        "tolerance": tolerance,
        "same_first_step": abs(first["hybrid"] - first["alone"]) <= tolerance,
        "ndcg": ndcg,
        "paired": asdict(paired),
        "spread": spread,
        "within_spread": abs(paired.mean) <= spread,
    }


def _table(summary: dict[str, Any]) -> str:
    paired, ndcg, first = summary["paired"], summary["ndcg"], summary["first_loss"]
    verdict = {True: "yes", False: "NO"}
    return table(
        ["figure", "one process", "TP 2 x PP 2 x DP 2", "difference", "bound", "within"],
        [
            [
                "loss of the first step",
                f"{first['alone']:.6f}",
                f"{first['hybrid']:.6f}",
                f"{summary['first_difference']:.1e}",
                f"{summary['tolerance']:.1e}",
                verdict[summary["same_first_step"]],
            ],
            [
                f"NDCG@10, {summary['seeds']} seeds",
                f"{statistics.fmean(ndcg['alone']):.4f}",
                f"{statistics.fmean(ndcg['hybrid']):.4f}",
                f"{paired['mean']:+.4f} ({paired['low']:+.4f} to {paired['high']:+.4f})",
                f"{summary['spread']:.4f}",
                verdict[summary["within_spread"]],
            ],
        ],
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.parallel_quality", description=__doc__
    )
    parser.add_argument("--data", type=Path, required=True, help="data directory")
    parser.add_argument("--seeds", type=int, default=5, help="pairs of runs (default 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/parallel-quality"), help="where runs are kept")
    parser.add_argument("--preset", default="scientific", help="settings of train.run (default scientific)")
    parser.add_argument("--epochs", type=int, help="passes over the users (default: the preset's)")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps, to try it out")
    parser.add_argument("--schedule", default="auto", help="of the pipeline (default %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 2:
        parser.error("--seeds: a spread needs two at least")
    if arguments.steps == 1:
        parser.error("--steps: 2 or more; the first step is compared anyway")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print the table; 1 when an answer is no."""
    arguments = _arguments(argv)
    study = ParallelStudy(
        data=arguments.data, out=arguments.out, preset=arguments.preset, nproc=8, nodes=2, epochs=arguments.epochs,
        schedule=arguments.schedule, steps=arguments.steps,
    )  # fmt: skip
    pairs = []
    try:
        study.claim()
        first = {arm: run.final["loss"] for arm, run in study.first_step().pair(0).items()}
        for seed in range(arguments.seeds):
            pairs.append(study.pair(seed))
            values = ", ".join(f"{arm} {run.final['ndcg']:.4f}" for arm, run in pairs[-1].items())
            print(f"seed {seed}: NDCG@10 {values}", flush=True)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    summary = summarise(pairs, first, study.first_step().tolerance(first["alone"]))
    (study.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(_table(summary))
    return 0 if summary["same_first_step"] and summary["within_spread"] else 1


if __name__ == "__main__":
    sys.exit(main())
