"""A head in shards, step by step, gives the loss and gradients of the table of all scores."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridcomm.context import Context
from model.config import ModelConfig
from model.head import HeadShard
from model.recommender import Recommender
from model.tensor_parallel import ALONE, TensorParallel
from model.vocab import Items
from tests.model.parallel import over
from tests.numerics import gamma

N, ITEMS, FEATURES = 23, 41, 5
CONFIG = ModelConfig(dim=6, layers=1, heads=1, hidden=4, dropout=0.0, init_std=1.0)


def whole(tied: bool, text: bool) -> tuple[Recommender, Tensor | None]:
    features = torch.randn(ITEMS, FEATURES, generator=torch.Generator().manual_seed(1)) if text else None
    torch.manual_seed(0)
    return Recommender(CONFIG.model_copy(update={"tied": tied}), ITEMS, features), features


def shards(contexts: list[Context], sizes: tuple[int, ...], model: Recommender) -> list[HeadShard]:
    """Made one after the other: torch has one generator for all threads."""
    table = model.table
    assert table is not None
    features = None if table.features is None else table.features.float()
    made = []
    for context in contexts[: len(sizes)]:
        group = TensorParallel(group=context.group(list(range(len(sizes)))))
        torch.manual_seed(0)
        items = Items(count=ITEMS, tp=group, sizes=sizes)
        made.append(HeadShard(model.config, features, items=items, tp=ALONE).double())
    return made


@pytest.mark.parametrize("sizes", [(21, 20), (30, 0, 11), (1, 2, 3, 35)])
@pytest.mark.parametrize(("tied", "text"), [(True, True), (True, False), (False, True)])
def test_shards_give_the_loss_and_gradients_of_the_whole(
    contexts: list[Context], sizes: tuple[int, ...], tied: bool, text: bool
) -> None:
    model, _ = whole(tied, text)
    heads = shards(contexts, sizes, model)
    model = model.double()
    random = torch.Generator().manual_seed(2)
    hidden = torch.randn(N, CONFIG.dim, dtype=torch.float64, generator=random) * 3
    targets = torch.randint(0, ITEMS, (N,), generator=random)

    def body(tp: TensorParallel) -> tuple[Tensor, Tensor, Tensor]:
        head = heads[tp.rank]
        scored = head.score(hidden, targets)
        every = torch.empty(len(sizes), 3, N, dtype=torch.float64)
        tp.group.all_gather(every, scored.statistics)  # type: ignore[union-attr]
        lengths = head.part_lengths(targets)
        parts = [scored.part.new_empty(length, CONFIG.dim) for length in lengths]
        tp.group.all_gather(parts, scored.part)  # type: ignore[union-attr]
        head.accumulate(scored, every, 0.5)
        gradient = head.states_gradient(list(enumerate(parts)), every, targets, 0.5)
        return head.loss(every), gradient, head.table.embedding.grad  # type: ignore[return-value]

    found = over(contexts, len(sizes), body)
    table = model.table if tied else model.head
    assert table is not None
    states = hidden.clone().requires_grad_()
    loss = F.cross_entropy(states @ table().T, targets, reduction="sum")
    (loss * 0.5).backward()
    exact = [loss.detach(), states.grad, table.embedding.grad]
    got = [found[0][0], found[0][1], torch.cat([each[2] for each in found])]
    for want, value in zip(exact, got, strict=True):
        bound = 4 * gamma(ITEMS + N + CONFIG.dim, "float64") * 50 * float(want.abs().max())
        torch.testing.assert_close(value, want, rtol=0.0, atol=bound)
    if tied and text:
        total = sum(head.table.text_projection.weight.grad for head in heads)
        want = model.table.text_projection.weight.grad  # type: ignore[union-attr]
        bound = 4 * gamma(ITEMS + N + CONFIG.dim, "float64") * 50 * float(want.abs().max())
        torch.testing.assert_close(total, want, rtol=0.0, atol=bound)


def test_a_split_that_is_none_is_refused(contexts: list[Context]) -> None:
    group = TensorParallel(group=contexts[0].group([0, 1]))
    for sizes in ((40, 2), (41,)):
        with pytest.raises(Exception, match="41 items on 2 ranks are not split as"):
            Items(count=ITEMS, tp=group, sizes=sizes)
