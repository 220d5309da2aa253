"""The sampler draws every user once at any rank count; packing keeps every token and its target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.builders import random_dataset
from train.batch import epoch_order, pack, rank_share, step_users, train_batch
from train.data import split_leave_one_out


@settings(deadline=None, derandomize=True)
@given(users=st.integers(1, 200), batch_size=st.integers(1, 70), world_size=st.integers(1, 9))
def test_an_epoch_draws_each_user_once(users: int, batch_size: int, world_size: int) -> None:
    order = epoch_order(users, 7, 2)
    steps = list(step_users(order, batch_size))
    drawn = [rank_share(step, rank, world_size) for step in steps for rank in range(world_size)]
    assert np.concatenate(drawn).tolist() == order.tolist()
    assert sorted(order) == list(range(users))
    for step in steps:
        sizes = [len(rank_share(step, rank, world_size)) for rank in range(world_size)]
        assert max(sizes) - min(sizes) <= 1


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    assert epoch_order(50, 1, 1).tolist() == epoch_order(50, 1, 1).tolist()
    assert epoch_order(50, 1, 1).tolist() != epoch_order(50, 1, 2).tolist()
    assert epoch_order(50, 1, 1).tolist() != epoch_order(50, 2, 1).tolist()


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 90), max_size=30))
def test_packing_keeps_sequences_whole(lengths: list[int]) -> None:
    sequences = [np.arange(length) + 100 * index for index, length in enumerate(lengths)]
    batch = pack(sequences, sequences)
    assert batch.targets.tolist() == [item for sequence in sequences for item in sequence]
    assert torch.equal(batch.items.reshape(-1)[batch.picks], batch.targets)
    for index, sequence in enumerate(sequences):
        where = (batch.segments == index).nonzero()
        assert len(where) == len(sequence)
        assert len(set(where[:, 0].tolist())) <= 1, "a sequence is split over rows"
        assert batch.positions[batch.segments == index].tolist() == list(range(len(sequence)))
    assert int((batch.segments >= 0).sum()) == sum(lengths)


def test_training_predicts_each_next_item_of_the_recent_prefix() -> None:
    data = random_dataset(20, 40)
    split = split_leave_one_out(data)
    for user in range(data.num_users):
        batch = train_batch(data, split, np.array([user]), max_len=4)
        prefix = data.sequence(user)[: split.train_ends[user]][-5:]
        assert batch.targets.tolist() == prefix[1:].tolist()
        assert batch.items.reshape(-1)[batch.picks].tolist() == prefix[:-1].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_step_holds_the_same_predictions_at_any_rank_count(world_size: int) -> None:
    data = random_dataset(40, 60)
    split = split_leave_one_out(data)
    users = epoch_order(40, 0, 0)[:13]
    whole = train_batch(data, split, users, 50).targets.tolist()
    shares = [train_batch(data, split, rank_share(users, r, world_size), 50) for r in range(world_size)]
    assert [target for share in shares for target in share.targets.tolist()] == whole


def test_draws_follow_users_whatever_the_batch() -> None:
    """What dropout makes masks of: the same for a user's token in any share, another in another step or run."""
    data = random_dataset(40, 60)
    split = split_leave_one_out(data)
    users = epoch_order(40, 0, 0)[:13]

    def draws(users: np.ndarray, **when: int) -> list[int]:
        batch = train_batch(data, split, users, 50, **when)
        assert batch.draws is not None
        assert len(set(batch.draws.reshape(-1)[batch.picks].tolist())) == len(batch.picks)
        return batch.draws.reshape(-1)[batch.picks].tolist()

    whole = draws(users)
    assert [number for rank in range(3) for number in draws(rank_share(users, rank, 3))] == whole
    for when in ({"step": 1}, {"seed": 1}):
        assert not set(draws(users, **when)) & set(whole)
