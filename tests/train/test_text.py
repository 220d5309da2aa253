"""Text features: reproducible, of the asked width, close for similar texts."""

from __future__ import annotations

import torch

from tests.numerics import gamma
from train.text import text_features

WORDS = ["red", "blue", "steel", "brass", "pump", "valve", "tape", "drill", "glove", "filter"]
TEXTS = [f"{a} {b} {c}" for a in WORDS[:4] for b in WORDS[4:] for c in ("small", "large")]


def test_features_are_reproducible_rows_of_one_mean_square() -> None:
    features = text_features(TEXTS, 8)
    assert features.shape == (len(TEXTS), 8)
    assert features.dtype == torch.float32
    assert features.is_contiguous()  # rank 0 broadcasts them
    assert torch.equal(features, text_features(TEXTS, 8))
    torch.testing.assert_close(
        features.square().mean(1), torch.full((len(TEXTS),), 0.25), rtol=gamma(3 * 8 + 8, "float32"), atol=0.0
    )


def test_similar_texts_are_close() -> None:
    features = text_features(["red steel pump", "red steel pumps", "latex glove box", *TEXTS], 12)
    products = features @ features[0] / 3
    assert products[1] > 0.8 > products[2]


def test_full_rank_features_keep_all_products() -> None:
    texts = TEXTS[:10]
    whole = text_features(texts, 10)
    gram = whole @ whole.T / 2.5
    again = text_features(list(reversed(texts)), 10)
    torch.testing.assert_close(
        gram.flip(0, 1), again @ again.T / 2.5, rtol=0.0, atol=1e3 * gamma(10, "float32")
    )


def test_empty_texts_and_more_features_than_texts() -> None:
    features = text_features(["", "one text"], 5)
    assert features.shape == (2, 5)
    assert not features[0].any()
    assert text_features([], 5).shape == (0, 5)
