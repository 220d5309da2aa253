"""Batches: which users a rank takes in a step, and how their sequences are packed into rows.

Histories are short and of uneven length, so several users share a row; ``segments`` keeps them apart. The
sampler is exact: in an epoch each user is drawn once at any number of ranks, and what a step holds does
not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.dropout import derive_draws
from model.vocab import Negatives
from train.data import Dataset, Split

__all__ = ["Packed", "epoch_order", "pack", "rank_share", "step_users", "train_batch", "user_draws"]

_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Token tensors of packed sequences, all int64: three of [rows, width], and the N picked tokens.

    ``picks`` [N] are flat indices of the tokens to score and ``targets`` [N] the items that follow them. ``negatives``:
    what the loss compares targets with; None: all items. ``draws``, int64 [rows, width]: what dropout makes masks of;
    None: of torch's generator.
    """

    items: Tensor
    segments: Tensor
    positions: Tensor
    picks: Tensor
    targets: Tensor
    negatives: Negatives | None = None
    draws: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.items, self.segments, self.positions, self.picks

    def to(self, device: torch.device) -> Packed:
        """On ``device``; to a GPU by way of pinned memory, without waiting for the copies."""
        if device.type == "cpu":
            return self
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: _moved(value, device) for name, value in found.items()})


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor, or a dataclass that has some, elsewhere."""
    if isinstance(value, Tensor):
        pinned = value.pin_memory() if device.type == "cuda" and torch.cuda.is_available() else value
        return pinned.to(device, non_blocking=True)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: _moved(getattr(value, field.name), device) for field in fields(value)}
        return replace(value, **parts)
    return value


def epoch_order(num: int, seed: int, epoch: int) -> np.ndarray:
    """The order of ``num`` users in an epoch: the same on every rank."""
    return np.random.default_rng((seed, epoch)).permutation(num)


def step_users(order: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Slices of the epoch's order, one per optimizer step; the last may be shorter."""
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]


def rank_share(users: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The contiguous part of a step's users that belongs to a rank; parts differ by at most one user."""
    return users[len(users) * rank // world_size : len(users) * (rank + 1) // world_size]


def pack(
    histories: Sequence[np.ndarray], targets: Sequence[np.ndarray], draws: np.ndarray | None = None
) -> Packed:
    """Packs histories into rows, next-fit in the given order; targets[i] follow the last tokens of
    histories[i].

    ``len(targets[i])`` tokens of history i are picked: its last ones. Padding is item 0 in segment -1.
    ``draws`` int64, one for each history: its tokens' count on from there.
    """
    width = max([_WIDTH, *(len(history) for history in histories)])
    total = sum(len(history) for history in histories)
    width = min(width, max(total, 1))
    cursor, spots = 0, []
    for history in histories:
        room = width - cursor % width
        if len(history) > room:
            cursor += room
        spots.append(cursor)
        cursor += len(history)
    rows = max(1, -(-cursor // width))
    items = np.zeros(rows * width, dtype=np.int64)
    segments = np.full(rows * width, -1, dtype=np.int64)
    positions = np.zeros(rows * width, dtype=np.int64)
    numbers = np.zeros(rows * width, dtype=np.int64)
    picks = []
    for index, (spot, history, target) in enumerate(zip(spots, histories, targets, strict=True)):
        end = spot + len(history)
        items[spot:end] = history
        segments[spot:end] = index
        positions[spot:end] = np.arange(len(history))
        numbers[spot:end] = positions[spot:end] + (0 if draws is None else draws[index])
        picks.append(np.arange(end - len(target), end))
    shape = (rows, width)
    none = np.zeros(0, dtype=np.int64)
    return Packed(
        items=torch.from_numpy(items.reshape(shape)),
        segments=torch.from_numpy(segments.reshape(shape)),
        positions=torch.from_numpy(positions.reshape(shape)),
        picks=torch.from_numpy(np.concatenate([none, *picks])),
        targets=torch.from_numpy(np.concatenate([none, *targets])),
        draws=None if draws is None else torch.from_numpy(numbers.reshape(shape)),
    )


def user_draws(users: np.ndarray, *, seed: int, step: int) -> np.ndarray:
    """What dropout makes its masks of in a step: int64, one for each user, whoever else is in the batch."""
    return derive_draws(derive_draws(torch.from_numpy(users), seed), step).numpy()


def train_batch(
    data: Dataset, split: Split, users: np.ndarray, max_len: int, *, seed: int = 0, step: int = 0
) -> Packed:
    """Every next-item prediction inside the users' training prefixes (the most recent ``max_len`` of each).

    ``seed`` and ``step``: dropout's masks are of these and of each user, whatever the batch they are in.
    """
    histories, targets = [], []
    for user in users:
        prefix = data.sequence(user)[: split.train_ends[user]][-(max_len + 1) :]
        histories.append(prefix[:-1])
        targets.append(prefix[1:])
    return pack(histories, targets, user_draws(users, seed=seed, step=step))
