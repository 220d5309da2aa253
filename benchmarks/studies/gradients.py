"""Gradients of the recommender as .npy files: what one of two nodes sums in a step, in backward's order.

    python -m benchmarks.studies.gradients DIR --data PATH --steps 200 --every 1

One process trains as two nodes would; each step's first half of the users is the first node. The files hold
fp32 vectors, one a step: parameters last to first, as buckets are filled.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from model.recommender import Recommender
from train.batch import epoch_order, step_users, train_batch
from train.config import PRESETS, TrainConfig
from train.data import load_directory, split_leave_one_out
from train.optim import build_optimizer, learning_rate
from train.synthetic import generate
from train.text import text_features

__all__ = ["load", "node_gradients"]

Floats = npt.NDArray[np.float32]


def load(directory: Path) -> list[Floats]:
    """All gradients of a directory in the order of their names, each flat fp32.

    Raises:
        FileNotFoundError: the directory holds no .npy file.
    """
    files = sorted(directory.glob("*.npy"))
    if not files:
        raise FileNotFoundError(
            f"{directory}: no .npy file; make some with python -m benchmarks.studies.gradients"
        )
    return [np.ascontiguousarray(np.load(file), np.float32).reshape(-1) for file in files]


def _flat(model: torch.nn.Module) -> Floats:
    grads = [p.grad.reshape(-1) for p in reversed(list(model.parameters())) if p.grad is not None]
    return np.asarray(torch.cat(grads).numpy().copy())


def node_gradients(config: TrainConfig, steps: int) -> Iterator[Floats]:
    """The first node's gradient of each of ``steps`` steps of a dense training."""
    data = generate(config.synthetic) if config.data is None else load_directory(config.data)
    split = split_leave_one_out(data)
    torch.manual_seed(config.seed)
    texts = data.texts if config.model.text else None
    features = None if texts is None else text_features(texts, config.text_features)
    model = Recommender(config.model, data.num_items, features)
    optimizer = build_optimizer(model.parameters(), config.optim)
    users = np.flatnonzero(split.train_ends >= 2)
    orders = (users[epoch_order(len(users), config.seed, epoch)] for epoch in itertools.count())
    batches = itertools.chain.from_iterable(step_users(order, config.batch_size) for order in orders)
    total = -(-len(users) // config.batch_size) * config.epochs
    for step, batch in enumerate(itertools.islice(batches, steps)):
        halves = [train_batch(data, split, half, config.model.max_len) for half in np.array_split(batch, 2)]
        count = sum(len(half.targets) for half in halves)
        for node, half in enumerate(halves):
            (model(*half.inputs, half.targets) / count).backward()
            if node == 0:
                yield _flat(model)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, total)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """The command of the module's head."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, help="where the .npy files go")
    parser.add_argument("--data", type=Path, help="data directory; without it data is generated")
    parser.add_argument(
        "--preset", default="scientific", choices=sorted(PRESETS), help="settings of train.run"
    )
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps to train")
    parser.add_argument("--every", type=int, default=1, help="keep one step in this many")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(**{"preset": arguments.preset, "data": arguments.data, **PRESETS[arguments.preset]})
    for step, gradient in enumerate(node_gradients(config, arguments.steps)):
        if step % arguments.every == 0:
            np.save(arguments.directory / f"step{step:06d}.npy", gradient)


if __name__ == "__main__":
    main()
