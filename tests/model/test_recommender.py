"""The recommender: nothing from the future or from other users reaches a score; every parameter is used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from model.config import ModelConfig
from model.recommender import Recommender
from tests.numerics import gamma
from train.batch import Packed, pack

ITEMS = 30
CONFIG = ModelConfig(dim=16, layers=2, heads=2, hidden=24, max_len=12, dropout=0.0, init_std=0.3)


def build(config: ModelConfig = CONFIG, features: int = 0) -> Recommender:
    torch.manual_seed(0)
    text = torch.randn(ITEMS, features) if features else None
    return Recommender(config, ITEMS, text).eval()


def histories(seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, ITEMS, length) for length in (5, 1, 12, 7, 3, 9)]


def packed(sequences: list[np.ndarray]) -> Packed:
    return pack(sequences, list(sequences))


def tolerance(scores: torch.Tensor) -> float:
    """Two evaluations of the same function in another order: a handful of sums of up to 24 terms per
    layer."""
    return 2 * gamma(CONFIG.layers * 6 * 24, "float32") * float(scores.abs().max())


def future_leak(model: Recommender) -> float:
    """Largest change of scores up to a position when only later items change."""
    sequence = histories()[2]
    changed = sequence.copy()
    changed[6:] = (changed[6:] + 1) % ITEMS
    with torch.no_grad():
        first, second = (model(*packed([s]).inputs) for s in (sequence, changed))
    assert (first[6:] - second[6:]).abs().max() > tolerance(first)
    return float((first[:6] - second[:6]).abs().max()) / tolerance(first)


def test_future_items_do_not_influence() -> None:
    assert future_leak(build()) <= 1


def test_control_a_planted_leak_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "tril_", lambda self: self)
    assert future_leak(build()) > 100


def test_users_in_one_row_do_not_see_each_other() -> None:
    model, sequences = build(), histories()
    with torch.no_grad():
        together = model(*packed(sequences).inputs)
        alone = torch.cat([model(*packed([sequence]).inputs) for sequence in sequences])
    assert packed(sequences).items.shape[0] < len(sequences)
    torch.testing.assert_close(together, alone, rtol=0.0, atol=tolerance(alone))


def test_control_a_shared_segment_is_noticed() -> None:
    model, sequences = build(), histories()
    batch = packed(sequences)
    with torch.no_grad():
        apart = model(*batch.inputs)
        mixed = model(batch.items, torch.zeros_like(batch.segments), batch.positions, batch.picks)
    assert (apart - mixed).abs().max() > 100 * tolerance(apart)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("features", [0, 8])
def test_every_parameter_gets_a_gradient(tied: bool, features: int) -> None:
    model = build(CONFIG.model_copy(update={"tied": tied}), features)
    names = dict(model.named_parameters())
    assert ("head.embedding" in names) is not tied
    assert ("table.text_projection.weight" in names) is bool(features)
    batch = packed(histories())
    model(*batch.inputs, batch.targets).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in names.values())


def test_a_batch_without_users_gives_zero_gradients() -> None:
    model = build(features=8)
    batch = pack([], [])
    loss = model(*batch.inputs, batch.targets)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_text_is_left_out_when_not_wanted() -> None:
    model = build(CONFIG.model_copy(update={"text": False}), 8)
    assert model.table is not None
    assert model.table.features is None
    assert not any("text" in name for name, _ in model.named_parameters())


def test_odd_head_width_is_refused() -> None:
    with pytest.raises(ValidationError, match="dim=18 must be an even multiple of heads=4"):
        ModelConfig(dim=18, heads=4)
