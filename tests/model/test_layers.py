"""Rotary positions and normalisation against independent formulas in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.layers import RMSNorm, RotaryTables, apply_rope, rope_tables
from tests.numerics import gamma

CHANNELS = 16


def rotated_products(turn_keys: bool) -> torch.Tensor:
    """Products of one query at position m with one key at position n, for all m, n: fp64 [T, T]."""
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, CHANNELS, generator=generator, dtype=torch.float64)
    tables = rope_tables(torch.arange(12)[None], CHANNELS, 10_000.0)
    tables = tables[0].double(), tables[1].double()
    queries = apply_rope(query.expand(1, 1, 12, CHANNELS), tables)[0, 0]
    keys = key.expand(1, 1, 12, CHANNELS)
    keys = (apply_rope(keys, tables) if turn_keys else keys)[0, 0]
    return queries @ keys.T


def spread_along_diagonals(products: torch.Tensor) -> float:
    tokens = len(products)
    return max(float(np.ptp(products.diagonal(offset).numpy())) for offset in range(1 - tokens, tokens))


def test_rope_products_depend_on_the_distance_only() -> None:
    # The angles are fp32 (position times rate, then cos and sin): three roundings of angles up to 11 radians.
    tolerance = 2 * CHANNELS * 11 * gamma(3, "float32") * 9
    assert spread_along_diagonals(rotated_products(turn_keys=True)) < tolerance


def test_rope_control_turning_queries_alone_is_noticed() -> None:
    tolerance = 2 * CHANNELS * 11 * gamma(3, "float32") * 9
    assert spread_along_diagonals(rotated_products(turn_keys=False)) > 100 * tolerance


def test_rope_keeps_lengths_and_position_zero() -> None:
    x = torch.randn(2, 3, 5, CHANNELS, generator=torch.Generator().manual_seed(0))
    turned = apply_rope(x, rope_tables(torch.arange(5).expand(2, 5), CHANNELS, 10_000.0))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    bound = gamma(CHANNELS + 8, "float32")
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=bound, atol=0.0)


def test_rotary_tables_are_those_of_the_positions() -> None:
    config = ModelConfig(dim=32, heads=2, max_len=9)
    positions = torch.tensor([[0, 1, 2, 8], [5, 6, 0, 1]])
    rotary = RotaryTables(config)
    for found, want in zip(rotary(positions), rope_tables(positions, 16, config.rope_base), strict=True):
        assert torch.equal(found, want)
    assert not rotary.state_dict()
    with pytest.raises(IndexError):
        rotary(positions + 1)


def test_rms_norm_against_fp64() -> None:
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1)) * 50
    norm = RMSNorm(32)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), exact, rtol=gamma(32 + 6, "float32"), atol=0.0)
