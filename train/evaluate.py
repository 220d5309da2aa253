"""Full-ranking evaluation: HR@10 and NDCG@10 of each user's target among all items that are not in the
history.

Ties go to the lower item index. A target that is itself in the history cannot be recommended and counts
as a miss. Each user is counted exactly once at any number of ranks: sums, not means, are added over the
ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model.ranking import NotFiniteError
from train.batch import pack, rank_share
from train.data import Dataset, Split
from train.errors import EvaluationError

if TYPE_CHECKING:
    from train.backend import Backend

__all__ = [
    "CUTOFF",
    "Metrics",
    "evaluate_model",
    "evaluate_ranks",
    "evaluate_scores",
    "popularity_scores",
    "target_ranks",
]

CUTOFF = 10
_BATCH = 256
_GAIN_UNITS = 2.0**40


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Means over users."""

    hr: float
    ndcg: float
    users: int


def target_ranks(scores: Tensor, targets: Tensor, histories: list[np.ndarray]) -> Tensor:
    """Rank (1 = best) of each row's target; scores [N, V], targets [N], one history per row -> int64 [N].

    Raises EvaluationError on scores that are not finite: NaN compares false with everything and would
    rank first.
    """
    if not torch.isfinite(scores).all():
        raise EvaluationError("the model's scores are not finite; the training has diverged")
    scores = scores.clone()
    rows = torch.from_numpy(np.repeat(np.arange(len(histories)), [len(history) for history in histories]))
    columns = torch.from_numpy(np.concatenate(histories)) if histories else torch.zeros(0, dtype=torch.int64)
    scores[rows, columns] = -torch.inf
    target = scores.gather(1, targets[:, None])
    above = (scores > target).sum(1)
    index = torch.arange(scores.shape[1])
    tied_before = ((scores == target) & (index < targets[:, None])).sum(1)
    excluded = target[:, 0] == -torch.inf
    return torch.where(excluded, scores.shape[1], above + tied_before + 1)


def _sums(ranks: Tensor) -> Tensor:
    """[hits, discounted gains, users] of ranks, int64.

    Each user's gain is rounded to a multiple of 2**-40: sums of integers are exact, so every number of ranks
    gives the same result.
    """
    hit = ranks <= CUTOFF
    gain = torch.where(hit, _GAIN_UNITS / torch.log2(ranks.double() + 1.0), 0.0).round().long()
    return torch.stack([hit.sum(), gain.sum(), torch.tensor(len(ranks))])


def evaluate_ranks(
    ranks: Callable[[list[np.ndarray], Tensor], Tensor],
    data: Dataset,
    split: Split,
    *,
    which: str,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Metrics:
    """Metrics on the validation or test targets of whatever ranks them: (histories, targets [N]) -> int64 [N].

    ``which`` is ``"validation"`` or ``"test"``; the test history includes the validation item. Users are shared out
    over ``world_size`` replicas; ``reduce`` adds an int64 array over them. Raises EvaluationError when the users
    counted are not all users once.
    """
    offset = {"validation": 0, "test": 1}[which]
    total = torch.zeros(3, dtype=torch.int64)
    share = rank_share(split.users, rank, world_size)
    for begin in range(0, len(share), _BATCH):
        users = share[begin : begin + _BATCH]
        histories = [data.sequence(user)[: split.train_ends[user] + offset] for user in users]
        targets = torch.from_numpy(data.items[data.starts[users] + split.train_ends[users] + offset])
        total += _sums(ranks(histories, targets))
    counts = total.numpy()
    hits, gain, users_seen = (reduce(counts) if reduce is not None else counts).tolist()
    if users_seen != len(split.users):
        raise EvaluationError(f"evaluated {users_seen} users instead of {len(split.users)}")
    return Metrics(hr=hits / users_seen, ndcg=gain / _GAIN_UNITS / users_seen, users=users_seen)


def evaluate_scores(
    score: Callable[[list[np.ndarray]], Tensor],
    data: Dataset,
    split: Split,
    *,
    which: str,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Metrics:
    """`evaluate_ranks` of any scorer: histories -> [N, items]."""

    def ranks(histories: list[np.ndarray], targets: Tensor) -> Tensor:
        return target_ranks(score(histories), targets, histories)

    return evaluate_ranks(ranks, data, split, which=which, rank=rank, world_size=world_size, reduce=reduce)


def evaluate_model(backend: Backend, data: Dataset, split: Split, max_len: int, *, which: str) -> Metrics:
    """Metrics of the model that ``backend`` has, which reads ``max_len`` items; leaves its training mode as it was."""
    module = backend.module
    was_training = module.training
    module.eval()

    def ranks(histories: list[np.ndarray], targets: Tensor) -> Tensor:
        recent = [history[-max_len:] for history in histories]
        batch = pack(recent, [target.numpy() for target in targets.split(1)])
        try:
            with torch.no_grad():
                return backend.target_ranks(batch, histories)
        except NotFiniteError as error:
            raise EvaluationError(str(error)) from None

    try:
        return evaluate_ranks(
            ranks, data, split, which=which,
            rank=backend.replica, world_size=backend.replicas, reduce=backend.sum,
        )  # fmt: skip
    finally:
        module.train(was_training)


def popularity_scores(data: Dataset, split: Split) -> Tensor:
    """How often each item occurs in the training prefixes, fp32 [items]."""
    counts = np.zeros(data.num_items, dtype=np.int64)
    for user in range(data.num_users):
        np.add.at(counts, data.sequence(user)[: split.train_ends[user]], 1)
    return torch.from_numpy(counts).float()
