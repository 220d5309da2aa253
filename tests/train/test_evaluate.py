"""Full ranking against a brute-force oracle, at any rank count; ties, histories and broken scores."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from tests.train.builders import dataset, random_dataset
from train.backend import WholeModel
from train.data import Dataset, Split, split_leave_one_out
from train.errors import EvaluationError
from train.evaluate import CUTOFF, Metrics, evaluate_model, evaluate_scores, popularity_scores, target_ranks
from train.replica import ModelSpec

ITEMS = 25
Score = Callable[[list[np.ndarray]], torch.Tensor]


def brute_force_rank(scores: list[float], target: int, history: set[int]) -> int | None:
    """Place of the target in the sorted list of allowed items; None when it is not allowed."""
    order = sorted(
        (item for item in range(len(scores)) if item not in history), key=lambda i: (-scores[i], i)
    )
    return order.index(target) + 1 if target in order else None


def brute_force(score: Score, data: Dataset, split: Split, offset: int) -> Metrics:
    hits = gain = 0.0
    for user in split.users:
        end = split.train_ends[user] + offset
        history = data.sequence(user)[:end]
        rank = brute_force_rank(
            score([history])[0].tolist(), int(data.sequence(user)[end]), set(history.tolist())
        )
        if rank is not None and rank <= CUTOFF:
            hits += 1
            gain += 1 / math.log2(rank + 1)
    return Metrics(hr=hits / len(split.users), ndcg=gain / len(split.users), users=len(split.users))


def rough_scores(histories: list[np.ndarray]) -> torch.Tensor:
    """Deterministic scores of a history with many ties."""
    rows = [np.random.default_rng(history.tolist()).integers(0, 6, ITEMS) for history in histories]
    return torch.from_numpy(np.stack(rows)).float()


@pytest.mark.parametrize(("which", "offset"), [("validation", 0), ("test", 1)])
def test_metrics_against_brute_force(which: str, offset: int) -> None:
    data = random_dataset(60, ITEMS)
    split = split_leave_one_out(data)
    got = evaluate_scores(rough_scores, data, split, which=which)
    expected = brute_force(rough_scores, data, split, offset)
    assert (got.hr, got.users) == (expected.hr, expected.users)
    assert abs(got.ndcg - expected.ndcg) < 60 * 2.0**-40


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_ranks_against_brute_force(draw: st.DataObject) -> None:
    scores = draw.draw(st.lists(st.integers(0, 3), min_size=4, max_size=12))
    target = draw.draw(st.integers(0, len(scores) - 1))
    history = draw.draw(st.lists(st.integers(0, len(scores) - 1), max_size=5))
    got = target_ranks(
        torch.tensor([scores]).float(), torch.tensor([target]), [np.array(history, dtype=np.int64)]
    ).item()
    expected = brute_force_rank([float(s) for s in scores], target, set(history))
    assert got == (len(scores) if expected is None else expected)


def test_ties_go_to_the_lower_index() -> None:
    ranks = target_ranks(
        torch.zeros(3, 5), torch.tensor([0, 2, 4]), [np.array([1]), np.array([1]), np.array([1])]
    )
    assert ranks.tolist() == [1, 2, 4]


def over_ranks(
    world_size: int, data: Dataset, split: Split, planted: Callable[[Split, int], Split]
) -> list[Metrics]:
    """Ranks as threads whose sums really wait for each other; ``planted`` may tamper with a rank's split."""
    barrier = threading.Barrier(world_size)
    parts: dict[int, np.ndarray] = {}
    results: dict[int, Metrics | Exception] = {}

    def body(rank: int) -> None:
        def reduce(values: np.ndarray) -> np.ndarray:
            parts[rank] = values
            barrier.wait(20)
            return np.sum([parts[r] for r in range(world_size)], axis=0)

        try:
            results[rank] = evaluate_scores(
                rough_scores,
                data,
                planted(split, rank),
                which="test",
                rank=rank,
                world_size=world_size,
                reduce=reduce,
            )
        except EvaluationError as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for result in results.values():
        if isinstance(result, Exception):
            raise result
    return [results[rank] for rank in range(world_size)]  # type: ignore[misc]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_rank_count_gives_the_same_bits(world_size: int) -> None:
    data = random_dataset(61, ITEMS)
    split = split_leave_one_out(data)
    single = evaluate_scores(rough_scores, data, split, which="test")
    assert over_ranks(world_size, data, split, lambda s, _: s) == [single] * world_size


def test_control_a_user_counted_twice_is_noticed() -> None:
    data = random_dataset(61, ITEMS)

    def planted(split: Split, rank: int) -> Split:
        users = np.append(split.users, split.users[-1]) if rank == 1 else split.users
        return Split(train_ends=split.train_ends, users=users)

    with pytest.raises(EvaluationError, match="users instead of"):
        over_ranks(2, data, split_leave_one_out(data), planted)


def test_control_a_leak_of_the_target_is_noticed() -> None:
    data = random_dataset(60, ITEMS)
    split = split_leave_one_out(data)
    leak = {tuple(data.sequence(u)[:-1].tolist()): int(data.sequence(u)[-1]) for u in split.users}

    def cheating(histories: list[np.ndarray]) -> torch.Tensor:
        return torch.nn.functional.one_hot(
            torch.tensor([leak[tuple(h.tolist())] for h in histories]), ITEMS
        ).float()

    assert evaluate_scores(cheating, data, split, which="test").ndcg == 1.0
    assert evaluate_scores(rough_scores, data, split, which="test").ndcg < 0.6


def test_a_repeated_target_is_a_miss() -> None:
    data = dataset([[0, 1, 2, 0]], 20)
    certain = torch.nn.functional.one_hot(torch.tensor([0]), 20).float()
    assert evaluate_scores(lambda _: certain, data, split_leave_one_out(data), which="test").hr == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    scores = torch.zeros(1, 5)
    scores[0, 3] = value
    with pytest.raises(EvaluationError, match="not finite"):
        target_ranks(scores, torch.tensor([3]), [np.array([0])])


def test_the_model_is_scored_after_its_whole_history() -> None:
    data = random_dataset(30, ITEMS)
    split = split_leave_one_out(data)
    config = ModelConfig(dim=8, layers=1, heads=1, hidden=8, max_len=5, init_std=0.5)
    backend = WholeModel()
    backend.build(ModelSpec(config=config, num_items=ITEMS))
    model = backend.model

    def one_by_one(histories: list[np.ndarray]) -> torch.Tensor:
        rows = []
        for history in histories:
            items = torch.from_numpy(history[-5:].copy())[None]
            segments, positions = torch.zeros_like(items), torch.arange(items.shape[1])[None]
            rows.append(model(items, segments, positions, torch.tensor([items.shape[1] - 1]))[0])
        return torch.stack(rows).detach()

    got = evaluate_model(backend, data, split, 5, which="test")
    assert model.training
    model.eval()
    expected = evaluate_scores(one_by_one, data, split, which="test")
    assert got.hr == expected.hr
    assert abs(got.ndcg - expected.ndcg) < 2.0**-30


def test_popularity_counts_training_items_only() -> None:
    data = dataset([[3, 3, 1, 2], [3, 0, 1], [4, 4]], 6)
    assert popularity_scores(data, split_leave_one_out(data)).tolist() == [0, 0, 0, 3, 2, 0]
