"""Dropout: masks follow tokens wherever they are computed; statistics, seeds, places, replay."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import model.dropout
from hybridcomm.context import Context
from hybridcomm.errors import UnsupportedError
from model.config import ModelConfig
from model.dropout import AttentionDropout, Dropout, derive_draws, fresh_draws
from model.layers import Attention
from model.recommender import Recommender
from model.tensor_parallel import TensorParallel, sum_partial_gradients
from tests.model.parallel import CONFIG, ITEMS, Decoder, batch, build, built
from tests.ranks import run_ranks
from train.batch import Packed, user_draws

P = 0.3
B, T, C = 20, 50, 40
N = B * T * C
DROPPING = CONFIG.model_copy(update={"dropout": P})


def drawn(seed: int = 0) -> Tensor:
    return derive_draws(torch.arange(B * T).view(B, T), seed)


def mask(draws: Tensor, *, place: int = 0) -> Tensor:
    return Dropout(P, place=place, channels=C)(torch.ones(*draws.shape, C, dtype=torch.float64), draws)


def apart(left: Tensor, right: Tensor) -> bool:
    """Whether two masks are as independent as chance allows: within 5 standard deviations of what they share."""
    both = ((left > 0) & (right > 0)).double().mean()
    expected = (1 - P) ** 2
    return abs(float(both) - expected) < 5 * (expected * (1 - expected) / left.numel()) ** 0.5


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9])
def test_masks_keep_the_mean_in_every_token_and_channel(p: float) -> None:
    ones = torch.ones(B, T, C, dtype=torch.float64)
    found = Dropout(p, place=0, channels=C)(ones, drawn())
    assert set(found.unique().tolist()) == {0.0, 1 / (1 - p)}
    for dims in [(0, 1, 2), (0, 1), (2,), (0, 2)]:
        share = (found > 0).double().mean(dims)
        count = N / share.numel()
        assert ((share - (1 - p)).abs() <= 6 * (p * (1 - p) / count) ** 0.5 + 1 / count).all(), dims


def test_counts_of_kept_channels_scatter_as_independent_ones_do() -> None:
    """Chi-squared of the tokens' counts about their mean, against C p (1 - p): 1 within 5 standard deviations."""
    counts = (mask(drawn()) > 0).double().sum(-1).flatten()
    ratio = float(((counts - C * (1 - P)) ** 2).mean() / (C * P * (1 - P)))
    assert abs(ratio - 1) < 5 * (2 / counts.numel()) ** 0.5


def of_users(users: np.ndarray, *, seed: int = 0, step: int = 0) -> Tensor:
    return torch.from_numpy(user_draws(users, seed=seed, step=step))[:, None] + torch.arange(T)


def test_masks_of_other_places_layers_steps_seeds_and_neighbours_are_independent() -> None:
    users = np.arange(B)
    masks = [
        *(mask(drawn(), place=place) for place in range(4)),
        *(mask(derive_draws(drawn(), layer)) for layer in (1, 2, 3)),
        *(mask(of_users(users, seed=seed)) for seed in (0, 1)),
        *(mask(of_users(users, step=step)) for step in (1, 2)),
        mask(of_users(users) + 1),
        mask(of_users(users + 1)),
    ]
    # The last two hold tokens of another, moved by one: what moves with them is alike, at its place it is not.
    assert all(apart(a, b) for a, b in itertools.combinations(masks, 2))
    assert torch.equal(masks[-1][:-1], masks[7][1:])
    assert apart(masks[0][..., 1:], masks[0][..., :-1])


def test_control_one_place_for_two_dropouts_is_noticed() -> None:
    assert not apart(mask(drawn(), place=2), mask(drawn(), place=2))


def test_control_draws_that_are_not_mixed_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain sums of token and channel have masks that repeat from token to token."""
    monkeypatch.setattr(model.dropout, "derive_draws", lambda draws, number: (draws + number) << 32)
    found = mask(torch.arange(B * T).view(B, T))
    assert not apart(found[:, 1:, :-1], found[:, :-1, 1:])


def test_a_tokens_mask_does_not_depend_on_what_is_beside_it() -> None:
    whole, order = mask(drawn()), torch.randperm(B, generator=torch.Generator().manual_seed(1))
    assert torch.equal(mask(drawn()[order]), whole[order])
    assert torch.equal(mask(drawn()[3:4, 5:9]), whole[3:4, 5:9])


def attention(draws: Tensor, heads: range) -> Tensor:
    shape = (draws.shape[0], len(heads), draws.shape[1], draws.shape[1])
    return AttentionDropout(P, place=0, heads=heads)(torch.ones(shape), draws)


def test_weights_of_attention_have_masks_of_head_query_and_key() -> None:
    draws = drawn()[:4]
    whole = attention(draws, range(6))
    assert torch.equal(attention(draws, range(2, 5)), whole[:, 2:5])
    assert torch.equal(attention(draws[:, 10:20], range(6)), whole[..., 10:20, 10:20])
    assert abs(float((whole > 0).double().mean()) - (1 - P)) < 5 * (P * (1 - P) / whole.numel()) ** 0.5
    assert apart(whole[:, 1:], whole[:, :-1])
    assert apart(whole[..., 1:, :], whole[..., :-1, :])
    assert apart(whole[..., 1:], whole[..., :-1])
    assert apart(whole, whole.transpose(-1, -2))


def test_evaluation_drops_nothing_and_training_asks_for_draws() -> None:
    x = torch.ones(1, 2, C)
    for layer in (Dropout(P, place=0, channels=C).eval(), Dropout(0.0, place=0, channels=C)):
        assert layer(x, None) is x
    with pytest.raises(UnsupportedError, match="a number for each token"):
        Dropout(P, place=0, channels=C)(x, None)


@pytest.mark.parametrize("sequence", [False, True])
def test_a_decoder_of_several_ranks_drops_what_one_rank_does(contexts: list[Context], sequence: bool) -> None:
    """Loss and gradients but for the order of sums; equal bits on all ranks."""
    alone = step(build(config=DROPPING))
    ranks = built(contexts, 3, lambda tp: build(tp, DROPPING), sequence=sequence)
    found = run_ranks(lambda context: step(ranks[context.rank]), contexts[:3])
    for loss, gradients in found:
        torch.testing.assert_close(loss, alone[0], rtol=1e-13, atol=0)
        for ours, first, theirs in zip(gradients, found[0][1], alone[1], strict=True):
            assert torch.equal(ours, first)
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    still = build(config=CONFIG)
    assert abs(float(still.loss(batch()).detach() - alone[0])) > 0.01


def step(decoder: Decoder) -> tuple[Tensor, list[Tensor]]:
    loss = decoder.loss(batch())
    loss.backward()
    sum_partial_gradients(decoder, decoder.tp)
    return loss.detach(), [
        p.grad for name, p in decoder.named_parameters() if "norm" in name or "text" in name
    ]


def test_the_mean_over_masks_is_the_layer_without_them() -> None:
    """Attention dropout scales what it keeps: over many seeds the mean of a layer's outputs is the plain output."""
    torch.manual_seed(0)
    layer = Attention(DROPPING)
    x, visible = torch.randn(1, 8, CONFIG.dim), torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    angles = torch.ones(1, 1, 8, 2), torch.zeros(1, 1, 8, 2)
    with torch.no_grad():
        plain = layer.eval()(x, angles, visible)
        outputs = torch.stack([layer.train()(x, angles, visible, drawn(seed)[:1, :8]) for seed in range(400)])
    error = (outputs.mean(0) - plain).abs()
    assert (error <= 5 * outputs.std(0) / 400**0.5 + 1e-6).all()
    assert outputs.std(0).mean() > 0.01 * plain.abs().mean()


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_drops_the_same(reentrant: bool) -> None:
    """Whatever the state of torch's generator, and though it is not restored."""
    layer = Dropout(P, place=0, channels=C)
    x = torch.ones(B, T, C, requires_grad=True)
    y = checkpoint(
        lambda t: layer(t * 1.0, drawn()).exp(), x, use_reentrant=reentrant, preserve_rng_state=False
    )
    torch.manual_seed(2)
    y.sum().backward()
    assert torch.equal(x.grad > 0, y > 1.0)


def loss_of(recommender: Recommender, packed: Packed) -> Tensor:
    return recommender(*packed.inputs, packed.targets)


def test_without_draws_masks_are_of_torchs_generator(contexts: list[Context]) -> None:
    torch.manual_seed(0)
    recommender = Recommender(ModelConfig(dim=8, layers=1, heads=2, hidden=8, dropout=P), ITEMS)
    packed = batch()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(loss_of(recommender, packed).detach()))
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(UnsupportedError, match="give the model ``draws``"):
        fresh_draws(packed.segments, TensorParallel(group=contexts[0].group([0, 1])))
