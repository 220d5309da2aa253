"""Does top-k 1 % cost quality? Dense against compressed on real data, paired by seed.

``python -m benchmarks.studies.quality --data DIR --seeds 8``. Both of a pair have the same initial weights,
order of users and dropout. Runs are kept under ``--out``; finished ones are not repeated; ``summary.json`` is
written there too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.runs import TrainingRun
from benchmarks.studies.statistics import PairedDifference
from benchmarks.table import table

_ARMS = {"dense": "none", "topk": "topk:0.01"}
_BOUND = -0.02


class StudyError(RuntimeError):
    """A run of the study failed, or the directory holds another study."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The settings all runs share."""

    data: Path
    out: Path
    preset: str
    nproc: int
    nodes: int
    epochs: int | None

    def options(self, arm: str) -> list[str]:
        """Of ``train.run``, in an arm."""
        options = ["--preset", self.preset, "--data", str(self.data), *self.arm(arm)]
        return options if self.epochs is None else [*options, "--epochs", str(self.epochs)]

    def arm(self, arm: str) -> list[str]:
        """What is an arm's own."""
        return ["--nproc", str(self.nproc), "--nodes", str(self.nodes), "--compress", _ARMS[arm]]

    def claim(self) -> None:
        """Make the directory this study's own; StudyError when it holds runs with other settings."""
        self.out.mkdir(parents=True, exist_ok=True)
        settings = {key: str(value) for key, value in asdict(self).items() if key not in ("out", "data")}
        settings["data"] = self.data.name
        file = self.out / "study.json"
        if file.exists() and (held := json.loads(file.read_text())) != settings:
            raise StudyError(f"{self.out} holds a study with {held}, now {settings}; choose another --out")
        file.write_text(json.dumps(settings, indent=1) + "\n")

    def run(self, arm: str, seed: int) -> TrainingRun:
        """The finished run of an arm and seed, made now unless it is there; StudyError when it fails."""
        run_dir = self.out / f"{arm}-seed{seed}"
        found = TrainingRun.read(run_dir)
        if found is not None:
            return found
        shutil.rmtree(run_dir, ignore_errors=True)  # an unfinished one
        argv = [sys.executable, "-m", "train.run", *self.options(arm)]
        argv += ["--seed", str(seed), "--run-dir", str(run_dir)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        run = TrainingRun.read(run_dir)
        if done.returncode != 0 or run is None:
            raise StudyError(
                f"{arm}, seed {seed}: train.run ended with {done.returncode}\n{done.stderr[-2000:]}"
            )
        return run


def summarise(runs: dict[str, list[TrainingRun]]) -> dict[str, Any]:
    """Absolute values, paired difference of NDCG@10 and HR@10, and bytes between nodes."""
    finals = {arm: [run.final for run in some] for arm, some in runs.items()}
    summary: dict[str, Any] = {
        "seeds": len(finals["dense"]),
        "popularity_ndcg": finals["dense"][0]["popularity_ndcg"],
    }
    for metric in ("ndcg", "hr"):
        values = {arm: [final[metric] for final in some] for arm, some in finals.items()}
        paired = PairedDifference.of(values["dense"], values["topk"])
        summary[metric] = {**values, "paired": asdict(paired), "relative_low": paired.relative_low}
    wire = {arm: [final["wire_nbytes_per_step"] for final in some] for arm, some in finals.items()}
    summary["wire_nbytes_per_step"] = wire
    summary["wire_ratio"] = sum(wire["dense"]) / sum(wire["topk"])
    return summary


def _print(summary: dict[str, Any]) -> None:
    rows = []
    for metric, name in (("ndcg", "NDCG@10"), ("hr", "HR@10")):
        entry, paired = summary[metric], summary[metric]["paired"]
        means = [f"{sum(entry[arm]) / len(entry[arm]):.4f}" for arm in _ARMS]
        interval = f"{paired['mean']:+.4f} ({paired['low']:+.4f} to {paired['high']:+.4f})"
        rows.append([name, *means, interval, f"{100 * entry['relative_low']:+.2f} %"])
    header = [f"{summary['seeds']} paired seeds", "dense", "top-k 1 %", "difference, 95 %", "lower bound"]
    print(table(header, rows))
    print(
        f"{summary['wire_ratio']:.1f}x fewer bytes between nodes; popularity's NDCG@10 "
        f"{summary['popularity_ndcg']:.4f}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.quality", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="data directory")
    parser.add_argument("--seeds", type=int, default=8, help="pairs of runs (default 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="where runs are kept")
    parser.add_argument("--preset", default="scientific", help="settings of train.run (default scientific)")
    parser.add_argument("--epochs", type=int, help="passes over the users (default: the preset's)")
    parser.add_argument("--nproc", type=int, default=4)
    parser.add_argument("--nodes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds: an interval needs two at least")
    return arguments


def main() -> int:
    """Run what is missing, summarise; 1 when the lower bound is below -2 %."""
    arguments = _arguments()
    study = Study(
        data=arguments.data,
        out=arguments.out,
        preset=arguments.preset,
        nproc=arguments.nproc,
        nodes=arguments.nodes,
        epochs=arguments.epochs,
    )
    runs: dict[str, list[TrainingRun]] = {arm: [] for arm in _ARMS}
    try:
        study.claim()
        for seed in range(arguments.seeds):
            for arm, some in runs.items():
                some.append(study.run(arm, seed))
                final = some[-1].final
                print(f"seed {seed} {arm}: NDCG@10 {final['ndcg']:.4f} HR@10 {final['hr']:.4f}", flush=True)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    summary = summarise(runs)
    (study.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    _print(summary)
    return 0 if summary["ndcg"]["relative_low"] >= _BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
