"""Dropout over ranks: one mask for what all have alike, masks of their own for parts; statistics, seeds, replay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import model.dropout
from hybridcomm.context import Context
from hybridcomm.errors import UnsupportedError
from model.dropout import Dropout
from model.layers import Attention
from model.tensor_parallel import TensorParallel, sum_partial_gradients
from tests.model.parallel import CONFIG, Decoder, batch, build
from tests.ranks import run_ranks

P = 0.3
N = 40_000
DROPPING = CONFIG.model_copy(update={"dropout": P})


def tps(contexts: list[Context], size: int, *, seed: int = 3, sequence: bool = False) -> list[TensorParallel]:
    return [
        TensorParallel(
            group=context.group(list(range(size))),
            sequence=sequence,
            generator=torch.Generator().manual_seed(seed),
        )
        for context in contexts[:size]
    ]


def masks(contexts: list[Context], *, split: bool, seed: int = 3, calls: int = 1) -> list[Tensor]:
    """Each rank's mask of the last of some calls."""
    out = []
    for tp in tps(contexts, 4, seed=seed):
        layer = Dropout(P, tp=tp, split=split)
        out.append([layer(torch.ones(N)) for _ in range(calls)][-1])
    return out


def apart(left: Tensor, right: Tensor) -> bool:
    """Whether two masks are as independent as chance allows: within 5 standard deviations of what they share."""
    both = ((left > 0) & (right > 0)).double().mean()
    expected = (1 - P) ** 2
    return abs(float(both) - expected) < 5 * (expected * (1 - expected) / N) ** 0.5


def test_whole_regions_have_one_mask(contexts: list[Context]) -> None:
    found = masks(contexts, split=False)
    assert all(torch.equal(each, found[0]) for each in found)


def test_parts_have_masks_of_their_own(contexts: list[Context]) -> None:
    found = masks(contexts, split=True)
    assert all(apart(found[a], found[b]) for a in range(4) for b in range(a))
    later = masks(contexts, split=True, calls=2)
    assert all(apart(then, now) for then in later for now in found)


@pytest.mark.parametrize("split", [False, True])
def test_masks_keep_the_mean_and_come_from_the_seed(contexts: list[Context], split: bool) -> None:
    found = masks(contexts, split=split)
    for mask in found:
        assert set(mask.unique().tolist()) == {0.0, float(torch.ones(()) / (1 - P))}
        assert abs(float((mask > 0).double().mean()) - (1 - P)) < 5 * (P * (1 - P) / N) ** 0.5
    assert all(torch.equal(a, b) for a, b in zip(found, masks(contexts, split=split), strict=True))
    assert all(apart(a, b) for a, b in zip(found, masks(contexts, split=split, seed=4), strict=True))


def test_a_split_region_leaves_all_generators_in_step(contexts: list[Context]) -> None:
    """What comes after is alike again, whatever the ranks' parts were."""
    after = []
    for tp in tps(contexts, 4):
        Dropout(P, tp=tp, split=True)(torch.ones(10 + tp.rank))
        after.append(Dropout(P, tp=tp)(torch.ones(N)))
    assert all(torch.equal(each, after[0]) for each in after)


def test_control_one_seed_for_all_ranks_is_noticed(
    contexts: list[Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.dropout, "_SPREAD", 0)
    found = masks(contexts, split=True)
    assert not apart(found[0], found[1])


def test_evaluation_drops_nothing() -> None:
    x = torch.ones(5)
    assert Dropout(P).eval()(x) is x
    assert Dropout(0.0)(x) is x


@pytest.mark.parametrize("sequence", [False, True])
def test_a_decoder_trains_alike_on_all_ranks(contexts: list[Context], sequence: bool) -> None:
    """Loss and gradients of what all ranks have are the same bits on all of them, and again under the same seed."""

    def run() -> list[tuple[Tensor, list[Tensor]]]:
        ranks = [build(tp, DROPPING) for tp in tps(contexts, 3, sequence=sequence)]
        return run_ranks(lambda context: step(ranks[context.rank]), contexts[:3])

    first, again = run(), run()
    for found in (*first, *again):
        assert torch.equal(found[0], first[0][0])
        assert all(torch.equal(a, b) for a, b in zip(found[1], first[0][1], strict=True))
    still = build(config=CONFIG)
    assert abs(float(still.loss(batch()).detach() - first[0][0])) > 0.01


def step(decoder: Decoder) -> tuple[Tensor, list[Tensor]]:
    loss = decoder.loss(batch())
    loss.backward()
    sum_partial_gradients(decoder, decoder.tp)
    return loss.detach(), [
        p.grad for name, p in decoder.named_parameters() if "norm" in name or "text" in name
    ]


def test_the_mean_over_masks_is_the_layer_without_them(contexts: list[Context]) -> None:
    """Attention dropout scales what it keeps: over many seeds the mean of a layer's outputs is the plain output."""
    torch.manual_seed(0)
    layer = Attention(DROPPING)
    x, mask = torch.randn(1, 8, CONFIG.dim), torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    angles = torch.ones(1, 1, 8, 2), torch.zeros(1, 1, 8, 2)
    with torch.no_grad():
        plain = layer.eval()(x, angles, mask)
        drawn = torch.stack([layer.train()(x, angles, mask) for _ in range(400)])
    error = (drawn.mean(0) - plain).abs()
    assert (error <= 5 * drawn.std(0) / 400**0.5 + 1e-6).all()
    assert drawn.std(0).mean() > 0.01 * plain.abs().mean()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks_again(
    contexts: list[Context], reentrant: bool, split: bool
) -> None:
    """With torch's own generator, which it restores: also where that seeds a rank's mask of its own."""
    layer = Dropout(P, tp=TensorParallel(group=contexts[1].group([0, 1])), split=split)
    x = torch.ones(N, requires_grad=True)
    torch.manual_seed(1)
    y = checkpoint(lambda t: layer(t * 1.0).exp(), x, use_reentrant=reentrant)
    torch.manual_seed(2)
    y.sum().backward()
    assert torch.equal(x.grad > 0, y > 1.0)


def test_checkpointing_with_another_generator_is_refused() -> None:
    own = Dropout(P, tp=TensorParallel(generator=torch.Generator().manual_seed(1)))
    x = torch.ones(N, requires_grad=True)
    loss = checkpoint(lambda t: own(t * 1.0).exp(), x, use_reentrant=False).sum()
    with pytest.raises(UnsupportedError, match=r"leave TensorParallel\.generator at None"):
        loss.backward()
