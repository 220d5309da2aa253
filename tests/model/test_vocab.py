"""The split item table: lookups, and the sampled softmax against its formula, at any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import model.vocab
from hybridcomm.context import Context
from hybridcomm.errors import UnsupportedError
from model.tensor_parallel import TensorParallel
from model.vocab import Items, ItemTable, Negatives, draw_negatives, embed, item_loss, sampled_item_loss
from tests.model.parallel import over
from tests.numerics import gamma

V, D, N = 43, 8, 19


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    table = torch.randn(V, D, generator=generator, dtype=torch.float64)
    return hidden, table, torch.randint(0, V, (N,), generator=generator)


Loss = Callable[[Tensor, Tensor, Items], Tensor]


def results(contexts: list[Context], size: int, loss: Loss) -> dict[str, Tensor]:
    """Loss and whole gradients of ``loss(hidden, own table, items)`` over some ranks."""
    hidden, table, _ = draw()

    def body(tp: TensorParallel) -> dict[str, Tensor]:
        items = Items(count=V, tp=tp)
        h, t = hidden.clone().requires_grad_(), table[items.begin : items.end].clone().requires_grad_()
        value = loss(h, t, items)
        value.backward()
        return {"loss": value.detach(), "hidden": h.grad, "table": t.grad}

    found = over(contexts, size, body)
    assert all(torch.equal(each[name], found[0][name]) for each in found for name in ("loss", "hidden"))
    return found[0] | {"table": torch.cat([each["table"] for each in found])}


def excess(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Largest difference of two evaluations in multiples of what reordered sums of V, N and D terms may do."""
    rounds = 8 * (V + N + D)
    return max(
        float((found[name] - value).abs().max()) / (gamma(rounds, "float64") * float(value.abs().max()))
        for name, value in exact.items()
    )


def formula(negatives: Negatives) -> dict[str, Tensor]:
    """The sampled loss written out, with autograd's gradients."""
    hidden, table, targets = draw()
    h, t = hidden.requires_grad_(), table.requires_grad_()
    target = (h * t[targets]).sum(1)
    scores = h @ t[negatives.items].T - negatives.log_expected
    scores = scores.masked_fill(negatives.items == targets[:, None], -torch.inf)
    value = (torch.cat([target[:, None], scores], 1).logsumexp(1) - target).sum()
    value.backward()
    return {"loss": value.detach(), "hidden": h.grad, "table": t.grad}


def sampled(negatives: Negatives) -> Loss:
    return lambda h, t, items: sampled_item_loss(h, t, draw()[2], items, negatives=negatives)


POPULAR = torch.linspace(0.1, 3.0, V, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("weights", [None, POPULAR], ids=["uniform", "weighted"])
@pytest.mark.parametrize("count", [1, 17, V])
def test_sampled_softmax_is_its_formula(
    contexts: list[Context], size: int, count: int, weights: Tensor | None
) -> None:
    negatives = draw_negatives(V, count, seed=5, weights=weights)
    assert excess(results(contexts, size, sampled(negatives)), formula(negatives)) <= 1


@pytest.mark.parametrize("size", [1, 3])
def test_all_items_drawn_once_are_the_full_softmax(contexts: list[Context], size: int) -> None:
    full = results(contexts, 1, lambda h, t, items: item_loss(h, t, draw()[2], items))
    everything = draw_negatives(V, V, seed=2)
    assert sorted(everything.items.tolist()) == list(range(V))
    assert excess(results(contexts, size, sampled(everything)), full) <= 1
    assert excess(results(contexts, size, sampled(draw_negatives(V, V - 5, seed=2))), full) > 1000


def estimates(weights: Tensor | None, *, shift: float = 0.0) -> tuple[Tensor, float]:
    """What many draws make of one state's sum of exponentials, and what it is."""
    hidden, table, targets = (each[:1] if index != 1 else each for index, each in enumerate(draw()))
    items = Items(count=V)
    target = float((hidden[0] * table[targets[0]]).sum())
    sums = []
    for seed in range(1500):
        drawn = draw_negatives(V, 9, seed=seed, weights=weights)
        drawn = Negatives(items=drawn.items, log_expected=drawn.log_expected + shift)
        sums.append(sampled_item_loss(hidden, table, targets, items, negatives=drawn) + target)
    return torch.stack(sums).exp(), float((hidden @ table.T).exp().sum())


@pytest.mark.parametrize("weights", [None, POPULAR], ids=["uniform", "weighted"])
def test_the_estimate_of_the_sum_is_unbiased(weights: Tensor | None) -> None:
    found, exact = estimates(weights)
    assert abs(float(found.mean()) - exact) < 5 * float(found.std()) / len(found) ** 0.5


def test_control_a_wrong_correction_is_noticed() -> None:
    found, exact = estimates(None, shift=0.2)
    assert abs(float(found.mean()) - exact) > 5 * float(found.std()) / len(found) ** 0.5


def test_a_draw_that_hits_the_target_counts_for_nothing() -> None:
    hidden, table, targets = draw()
    h = hidden.requires_grad_()
    only = Negatives(items=targets[:1], log_expected=torch.zeros(1, dtype=torch.float64))
    loss = sampled_item_loss(h[:1], table, targets[:1], Items(count=V), negatives=only)
    loss.backward()
    assert loss == 0
    assert not h.grad.any()


def test_draws_come_from_the_seed() -> None:
    for weights in (None, POPULAR):
        first, again, other = (draw_negatives(V, 12, seed=seed, weights=weights) for seed in (1, 1, 2))
        assert torch.equal(first.items, again.items)
        assert not torch.equal(first.items, other.items)
    assert len(set(draw_negatives(V, V, seed=1).items.tolist())) == V
    drawn = torch.bincount(draw_negatives(V, 43_000, seed=1, weights=POPULAR).items, minlength=V).double()
    expected = 43_000 * POPULAR / POPULAR.sum()
    assert ((drawn - expected).abs() < 5 * expected.sqrt()).all()


def test_draws_that_cannot_be_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="44 different items cannot be drawn from 43"):
        draw_negatives(V, V + 1, seed=0)
    with pytest.raises(UnsupportedError, match="3 weights for 43 items"):
        draw_negatives(V, 2, seed=0, weights=torch.ones(3))


# -- lookups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [V, 3])
@pytest.mark.parametrize(("size", "sequence"), [(1, False), (2, False), (4, False), (2, True), (4, True)])
def test_lookups_are_exact(contexts: list[Context], size: int, sequence: bool, count: int) -> None:
    """Each vector is one rank's and zeros of the others: the very bits of the table, whoever holds it; also for ranks
    that have no item. Gradients of integers are exact too."""
    table = torch.randn(count, D, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(0, count, (5, 3), generator=torch.Generator().manual_seed(2))
    weights = torch.arange(15.0)[:, None].expand(15, D)

    def body(tp: TensorParallel) -> tuple[Tensor, Tensor]:
        items = Items(count=count, tp=tp)
        own = table[items.begin : items.end].clone().requires_grad_()
        vectors = embed(ids, own, items)
        part = weights.split(list(tp.sizes(15)))[tp.rank] if sequence else weights
        (vectors.reshape(-1, D) * part).sum().backward()
        return vectors.detach(), own.grad

    found = over(contexts, size, body, sequence=sequence)
    whole = torch.cat([vectors for vectors, _ in found]) if sequence else found[0][0]
    assert torch.equal(whole.reshape(5, 3, D), table[ids])
    exact = torch.zeros(count, D).index_add_(0, ids.reshape(-1), weights)
    assert torch.equal(torch.cat([grad for _, grad in found]), exact)


def test_features_are_split_with_the_items(contexts: list[Context]) -> None:
    features = torch.randn(V, 4, generator=torch.Generator().manual_seed(3))
    tables = [
        ItemTable(V, D, features=features, tp=TensorParallel(group=c.group([0, 1, 2]))) for c in contexts[:3]
    ]
    assert torch.equal(torch.cat([table.features for table in tables]), features)
    assert "features" not in tables[0].state_dict()
    assert [len(table()) for table in tables] == [15, 14, 14]


def test_items_that_are_not_there_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"items must be in 0\.\.42: 0\.\.43"):
        embed(torch.tensor([0, V]), torch.zeros(V, D), Items(count=V))


def test_control_accidental_hits_left_in_are_noticed(
    monkeypatch: pytest.MonkeyPatch, contexts: list[Context]
) -> None:
    negatives = draw_negatives(V, V, seed=2)
    columns = model.vocab.Columns
    monkeypatch.setattr(model.vocab, "Columns", lambda **options: columns(**options | {"leave_out": None}))
    assert excess(results(contexts, 2, sampled(negatives)), formula(negatives)) > 1000
