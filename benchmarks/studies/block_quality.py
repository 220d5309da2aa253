"""What the selection rule costs in quality: NDCG@10 of trainings that differ in nothing but the rule.

    python -m benchmarks.studies.block_quality --data PATH --seeds 2 --epochs 12

One process, one node: its gradient plus residual goes through the rule, and what the rule sends is applied. Dense,
global exact top-k and blocks of several sizes (``block_topk.RULES``) see the same initial weights, users and dropout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks.studies.block_topk import RULES, Rule, compress
from benchmarks.table import table
from train.backend import WholeModel
from train.config import PRESETS, TrainConfig
from train.data import Dataset, Split, load_directory, split_leave_one_out
from train.loop import Trainer
from train.optim import build_optimizer
from train.replica import ModelSpec
from train.report import Reporter
from train.text import text_features

__all__ = ["RuleBackend", "ndcg"]


class RuleBackend(WholeModel):
    """One rank whose gradients pass through a rule with error feedback; None passes them on as they are."""

    def __init__(self, rule: Rule | None) -> None:
        self._rule = rule
        self._residual: np.ndarray | None = None

    def averaged(self) -> float:
        if self._rule is None:
            return 0.0
        parameters = list(reversed(list(self.model.parameters())))  # as buckets are filled
        gradient = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None]).numpy()
        compensated = gradient if self._residual is None else gradient + self._residual
        sent = compress(compensated, self._rule)
        self._residual = compensated - sent
        pieces = torch.from_numpy(sent).split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).clone()
        return 0.0


def ndcg(config: TrainConfig, data: Dataset, split: Split, rule: Rule | None, directory: Path) -> float:
    """Test NDCG@10 of the weights that validated best."""
    features = text_features(data.texts, config.text_features) if data.texts and config.model.text else None
    backend = RuleBackend(rule)
    spec = ModelSpec(config=config.model, num_items=data.num_items, features=features, seed=config.seed)
    parameters = backend.build(spec)
    trainer = Trainer(
        config,
        data=data,
        split=split,
        backend=backend,
        parameters=parameters,
        optimizer=build_optimizer(parameters, config.optim),
        reporter=Reporter(config, directory, active=False),
    )
    outcome = trainer.run()
    if outcome.test is None:
        raise RuntimeError("the training ended without a test")
    return outcome.test.ndcg


def main() -> None:
    """The command of the module's head."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="data directory")
    parser.add_argument("--seeds", type=int, default=2, help="trainings per rule")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the users")
    parser.add_argument(
        "--preset", default="scientific", choices=sorted(PRESETS), help="settings of train.run"
    )
    arguments = parser.parse_args()
    data = load_directory(arguments.data)
    split = split_leave_one_out(data)
    settings = {"preset": arguments.preset, "data": arguments.data, **PRESETS[arguments.preset]}
    rules: list[Rule | None] = [None, *RULES]
    scores: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        for rule in rules:
            config = TrainConfig(**{**settings, "epochs": arguments.epochs, "seed": seed})
            name = "dense" if rule is None else rule.name
            scores.setdefault(name, []).append(
                ndcg(config, data, split, rule, Path("runs") / "block_quality")
            )
            print(f"seed {seed}  {name:28} NDCG@10 {scores[name][-1]:.4f}", flush=True)
    dense = np.array(scores["dense"])
    rows = [
        [name, f"{np.mean(values):.4f}", f"{100 * float(np.mean(np.array(values) / dense - 1)):+.1f} %"]
        for name, values in scores.items()
    ]
    print(table(["rule", "NDCG@10", "to dense"], rows))


if __name__ == "__main__":
    main()
