"""Embedded data: a Markov chain over items whose best reachable NDCG@10 is known.

1. items       have a popularity (Zipf) and a latent cluster
2. transition  ``follow`` of the probability goes to a few successors of the last item, the rest to a
               cluster drawn from the last item's cluster, and there to an item by popularity
3. users       start at a popular item and walk; no item comes twice (the rest of the row is renormalised)

Given a history, the next item's true distribution is the last item's row without the history. Ranking by
it is Bayes-optimal, and its expected NDCG@10 is the bound that `best_ndcg` computes: exactly, from the
rows.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from train.data import Dataset

__all__ = ["SyntheticConfig", "best_ndcg", "generate", "next_item_probabilities", "transition_matrix"]


class SyntheticConfig(BaseModel):
    """Size and shape of the generated data."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    users: int = Field(4000, ge=1, description="Users (sequences).")
    items: int = Field(600, ge=40, description="Catalogue size.")
    clusters: int = Field(12, ge=1, description="Latent item clusters.")
    min_len: int = Field(8, ge=3, description="Shortest sequence, in items.")
    max_len: int = Field(16, ge=3, description="Longest sequence, in items.")
    follow: float = Field(
        0.7, ge=0.0, lt=1.0, description="Probability of going to one of the item's successors."
    )
    successors: int = Field(3, ge=1, description="Successors of an item.")
    zipf: float = Field(0.8, ge=0.0, description="Exponent of the popularity skew.")
    data_seed: int = Field(0, ge=0, description="Seed of the generator; --seed is that of the training.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> SyntheticConfig:
        if self.min_len > self.max_len:
            raise ValueError(f"min_len={self.min_len} is larger than max_len={self.max_len}")
        if self.max_len * 2 > self.items:
            raise ValueError(
                f"max_len={self.max_len} needs at least {2 * self.max_len} items, there are {self.items}"
            )
        if self.clusters > self.items // 2:
            raise ValueError(f"clusters={self.clusters}: at most half of the {self.items} items")
        return self


def transition_matrix(config: SyntheticConfig) -> tuple[np.ndarray, np.ndarray]:
    """Row-stochastic matrix [items, items] of the chain and the start distribution [items], fp64."""
    random = np.random.default_rng((config.data_seed, 0))
    popularity = random.permutation((1.0 + np.arange(config.items)) ** -config.zipf)
    popularity /= popularity.sum()
    cluster = random.permutation(np.arange(config.items) % config.clusters)
    jumps = (
        0.6 * np.eye(config.clusters)
        + 0.3 * np.roll(np.eye(config.clusters), 1, axis=1)
        + 0.1 / config.clusters
    )
    members = (cluster[None, :] == np.arange(config.clusters)[:, None]) * popularity
    members /= members.sum(1, keepdims=True)
    background = (jumps @ members)[cluster]
    weights = 0.5 ** np.arange(config.successors)
    weights /= weights.sum()
    follow = np.zeros_like(background)
    for item in range(config.items):
        chosen = random.choice(config.items, config.successors, replace=False, p=background[item])
        follow[item, chosen] = weights
    return config.follow * follow + (1.0 - config.follow) * background, popularity


def next_item_probabilities(matrix: np.ndarray, history: np.ndarray) -> np.ndarray:
    """The true distribution of the item after ``history`` (int64, oldest first), fp64 [items]."""
    row = matrix[history[-1]].copy()
    row[history] = 0.0
    return row / row.sum()


def generate(config: SyntheticConfig) -> Dataset:
    """Draws all users; a pure function of the configuration."""
    matrix, start = transition_matrix(config)
    random = np.random.default_rng((config.data_seed, 1))
    lengths = random.integers(config.min_len, config.max_len + 1, config.users)
    walk = np.empty((config.users, config.max_len), dtype=np.int64)
    walk[:, 0] = random.choice(config.items, config.users, p=start)
    everyone = np.arange(config.users)
    for step in range(1, config.max_len):
        rows = matrix[walk[:, step - 1]]
        rows[everyone[:, None], walk[:, :step]] = 0.0
        sums = rows.cumsum(1)
        draws = random.random(config.users) * sums[:, -1]
        walk[:, step] = (sums <= draws[:, None]).sum(1)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    items = walk[np.arange(config.max_len)[None, :] < lengths[:, None]]
    histories = [items[begin : end - 1] for begin, end in pairwise(starts)]
    return Dataset(
        name="synthetic",
        items=items,
        starts=starts,
        num_items=config.items,
        best_ndcg=best_ndcg(matrix, histories),
    )


def best_ndcg(matrix: np.ndarray, histories: list[np.ndarray], cutoff: int = 10) -> float:
    """Expected NDCG of the Bayes-optimal ranking, averaged over the histories.

    With one relevant item, NDCG is 1 / log2(1 + rank); its expectation is largest when items are ranked by
    probability, and is then the sum over ranks of probability / log2(1 + rank).
    """
    discounts = 1.0 / np.log2(np.arange(cutoff) + 2.0)
    best = [
        np.sort(next_item_probabilities(matrix, history))[::-1][:cutoff] @ discounts for history in histories
    ]
    return float(np.mean(best))
