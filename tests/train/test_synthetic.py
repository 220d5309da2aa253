"""The generator's bound on NDCG@10 against Monte Carlo, and its data against its own distribution."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from pydantic import ValidationError

from train.synthetic import SyntheticConfig, best_ndcg, generate, next_item_probabilities, transition_matrix

SMALL = SyntheticConfig(users=1500, items=60, clusters=5, min_len=4, max_len=10)


def test_rows_are_distributions() -> None:
    matrix, start = transition_matrix(SMALL)
    assert (matrix >= 0).all()
    np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=0, atol=60 * 2.0**-52)
    assert abs(start.sum() - 1.0) < 60 * 2.0**-52


def histories_of_tests() -> list[np.ndarray]:
    data = generate(SMALL)
    return [data.sequence(user)[:-1] for user in range(data.num_users)]


def sampled_ndcg(matrix: np.ndarray, histories: list[np.ndarray], ranking: np.ndarray) -> tuple[float, float]:
    """Mean NDCG@10 of drawn next items under a ranking by ``ranking``'s rows, and its standard error."""
    random = np.random.default_rng(11)
    gains = []
    for history in histories:
        allowed = [item for item in range(len(matrix)) if item not in set(history.tolist())]
        weights = np.array([matrix[history[-1], item] for item in allowed])
        order = sorted(allowed, key=lambda item: -ranking[history[-1], item])[:10]
        for target in random.choice(allowed, size=8, p=weights / weights.sum()):
            gains.append(1 / math.log2(order.index(target) + 2) if target in order else 0.0)
    return float(np.mean(gains)), float(np.std(gains) / math.sqrt(len(gains)))


def test_best_ndcg_is_what_the_true_ranking_reaches() -> None:
    matrix, _ = transition_matrix(SMALL)
    histories = histories_of_tests()
    mean, error = sampled_ndcg(matrix, histories, matrix)
    assert abs(mean - best_ndcg(matrix, histories)) < 4 * error
    assert generate(SMALL).best_ndcg == best_ndcg(matrix, histories)


def test_control_another_ranking_reaches_less() -> None:
    matrix, _ = transition_matrix(SMALL)
    histories = histories_of_tests()
    mean, error = sampled_ndcg(matrix, histories, matrix[::-1])
    assert mean < best_ndcg(matrix, histories) - 10 * error


def test_no_order_of_items_beats_the_bound() -> None:
    matrix = np.array(
        [[0.1, 0.5, 0.2, 0.2], [0.3, 0.1, 0.2, 0.4], [0.0, 0.6, 0.3, 0.1], [0.7, 0.1, 0.1, 0.1]]
    )
    for history in ([0], [2, 1], [3]):
        row = next_item_probabilities(matrix, np.array(history))
        best = max(
            sum(row[item] / math.log2(place + 2) for place, item in enumerate(order[:2]))
            for order in itertools.permutations(range(4))
        )
        assert best_ndcg(matrix, [np.array(history)], cutoff=2) == pytest.approx(best, abs=2.0**-50)


def test_drawn_transitions_follow_the_matrix() -> None:
    data = generate(SMALL)
    matrix, start = transition_matrix(SMALL)
    pairs = [(data.sequence(user)[0], data.sequence(user)[1]) for user in range(data.num_users)]
    first = int(np.argmax(start))
    follow = [second for begin, second in pairs if begin == first]
    row = next_item_probabilities(matrix, np.array([first]))
    likeliest = int(row.argmax())
    expected, error = row[likeliest], math.sqrt(row[likeliest] * (1 - row[likeliest]) / len(follow))
    assert abs(np.mean(np.array(follow) == likeliest) - expected) < 4 * error


def test_sequences_hold_no_item_twice_and_are_reproducible() -> None:
    data = generate(SMALL)
    lengths = np.diff(data.starts)
    assert lengths.min() >= SMALL.min_len
    assert lengths.max() <= SMALL.max_len
    assert all(len(set(data.sequence(u).tolist())) == lengths[u] for u in range(data.num_users))
    assert np.array_equal(generate(SMALL).items, data.items)
    assert not np.array_equal(generate(SMALL.model_copy(update={"data_seed": 1})).items[:50], data.items[:50])


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_len=9 is larger"):
        SyntheticConfig(min_len=9, max_len=5)
