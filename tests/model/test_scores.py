"""The full softmax in tiles and over ranks: loss and gradients against fp64, memory, precision; bugs are noticed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import model.scores
from hybridcomm.context import Context
from hybridcomm.errors import UnsupportedError
from model.scores import TILE, Columns, Tile, log_sums
from model.tensor_parallel import ALONE, TensorParallel
from model.vocab import Items, ItemTable, item_loss
from model.weight_gradients import Deferrable, WeightGradients
from tests.model.parallel import over
from tests.numerics import SMALLEST_NORMAL, UNIT_ROUNDOFF, gamma

N, D = 23, 12
RAGGED = Tile(rows=5, columns=7, kept=0)
KEEPING = Tile(rows=5, columns=7)


def draw(items: int, scale: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, table and targets; scores are about ``scale`` wide and rise along the table."""
    generator = torch.Generator().manual_seed(items)
    hidden = torch.randn(N, D, generator=generator)
    table = torch.randn(items, D, generator=generator) * (scale / D**0.5)
    table *= torch.linspace(0.5, 1.5, items)[:, None]
    return hidden.to(dtype), table.to(dtype), torch.randint(0, items, (N,), generator=generator)


class Oracle:
    """Loss and gradients in fp64 from the table of all scores, and how far a computed one may be off."""

    def __init__(
        self, hidden: Tensor, table: Tensor, targets: Tensor, dtype: str, *, factor: float = 1.0
    ) -> None:
        h, t = (each.double().clone().requires_grad_() for each in (hidden, table))
        scores = h @ t.T
        loss = torch.nn.functional.cross_entropy(scores, targets, reduction="sum") * factor
        loss.backward()
        self.exact = {"loss": loss.detach(), "hidden": h.grad, "table": t.grad}
        h, t, scores = h.detach(), t.detach(), scores.detach()
        chances, chosen = scores.softmax(1), torch.nn.functional.one_hot(targets, len(table)).double()
        # A score is a sum of D products; what it is off moves its exponential by as much, relatively, and the log of
        # the sum by no more; an argument of exp is rounded, the sum has as many terms as items.
        score = gamma(D + 2, dtype) * float((h.abs() @ t.abs().T).max())
        argument = 4 * UNIT_ROUNDOFF[dtype] * float(scores.abs().max())
        chance = 2 * (score + argument) + 2 * gamma(len(table) + 8, dtype)
        tiny = SMALLEST_NORMAL[dtype]  # chances below it are lost, or lose digits
        terms = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
        self.bounds = {
            "loss": N * (2 * score + argument + gamma(len(table) + 8, dtype))
            + gamma(N + 4, dtype) * terms.sum(),
            "hidden": (chance + gamma(len(table) + 4, dtype)) * ((chances + chosen) @ t.abs())
            + tiny * t.abs().sum(),
            "table": (chance + gamma(N + 4, dtype)) * ((chances + chosen).T @ h.abs()) + tiny * h.abs().sum(),
        }
        self.bounds = {name: value * factor for name, value in self.bounds.items()}

    def excess(self, found: dict[str, Tensor], *, output: str | None = None) -> float:
        """The largest error in multiples of its bound; ``output`` is the dtype that gradients are rounded to."""
        worst = 0.0
        for name, exact in self.exact.items():
            allowed = self.bounds[name]
            if output is not None and name != "loss":
                allowed = allowed + UNIT_ROUNDOFF[output] * (exact.abs() + allowed)
            worst = max(worst, float(((found[name].double() - exact).abs() / allowed).max()))
        return worst


def computed(loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, table: Tensor) -> dict[str, Tensor]:
    h, t = hidden.clone().requires_grad_(), table.clone().requires_grad_()
    value = loss(h, t)
    value.backward()
    return {"loss": value.detach(), "hidden": h.grad, "table": t.grad}


def over_ranks(
    contexts: list[Context],
    size: int,
    data: tuple[Tensor, Tensor, Tensor],
    *,
    factor: float = 1.0,
    tile: Tile = RAGGED,
) -> dict[str, Tensor]:
    hidden, table, targets = data

    def body(tp: TensorParallel) -> dict[str, Tensor]:
        items = Items(count=len(table), tp=tp)
        own = table[items.begin : items.end]
        return computed(lambda h, t: item_loss(h, t, targets, items, tile=tile) * factor, hidden, own)

    found = over(contexts, size, body)
    assert all(torch.equal(each[name], found[0][name]) for each in found for name in ("loss", "hidden"))
    return found[0] | {"table": torch.cat([each["table"] for each in found])}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("scale", [0.1, 5.0, 80.0])
@pytest.mark.parametrize("tile", [RAGGED, KEEPING], ids=["computed again", "kept"])
@pytest.mark.parametrize(("size", "items"), [(1, 41), (2, 41), (4, 41), (4, 3), (3, 64)])
def test_loss_and_gradients_against_fp64(
    contexts: list[Context], size: int, items: int, tile: Tile, scale: float, dtype: str
) -> None:
    """bf16 is computed in fp32: all that its gradients lose is their own last rounding."""
    data = draw(items, scale, getattr(torch, dtype))
    working = "float32" if dtype == "bfloat16" else dtype
    oracle = Oracle(*data, working, factor=0.25)
    found = over_ranks(contexts, size, data, factor=0.25, tile=tile)
    assert oracle.excess(found, output=dtype) <= 1


@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 50),
    items=st.integers(1, 45),
    predictions=st.integers(1, N),
    kept=st.integers(0, N * 45),
)
def test_any_tile_gives_the_same(rows: int, columns: int, items: int, predictions: int, kept: int) -> None:
    hidden, table, targets = draw(items, 5.0, torch.float64)
    hidden, targets = hidden[:predictions], targets[:predictions]
    tile = Tile(rows=rows, columns=columns, kept=kept)
    found = computed(lambda h, t: item_loss(h, t, targets, Items(count=items), tile=tile), hidden, table)
    assert Oracle(hidden, table, targets, "float64").excess(found) <= 1


def test_control_scores_in_bf16_are_noticed() -> None:
    hidden, table, targets = draw(41, 5.0, torch.bfloat16)
    found = computed(lambda h, t: F.cross_entropy((h @ t.T).float(), targets, reduction="sum"), hidden, table)
    assert Oracle(hidden, table, targets, "float32").excess(found, output="bfloat16") > 10


def test_default_tile_equals_the_table_of_scores() -> None:
    """More rows and columns than one tile has, neither a multiple of it."""
    generator = torch.Generator().manual_seed(0)
    rows, items = TILE.rows + 3, 2 * TILE.columns + 5
    hidden = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    table = torch.randn(items, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, items, (rows,), generator=generator)
    ours = computed(lambda h, t: item_loss(h, t, targets, Items(count=items)), hidden, table)
    plain = computed(lambda h, t: F.cross_entropy(h @ t.T, targets, reduction="sum"), hidden, table)
    for name, exact in plain.items():
        bound = 4 * gamma(items + rows + D, "float64") * float(exact.abs().max())
        torch.testing.assert_close(ours[name], exact, rtol=0.0, atol=bound)


def test_autocast_changes_nothing() -> None:
    hidden, table, targets = draw(41, 5.0)
    plain = computed(lambda h, t: item_loss(h, t, targets, Items(count=41)), hidden, table)

    def cast(h: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return item_loss(h, t, targets, Items(count=41))

    assert all(torch.equal(value, plain[name]) for name, value in computed(cast, hidden, table).items())


def test_a_whole_catalogue_over_four_ranks(contexts: list[Context]) -> None:
    data = draw(63_001, 5.0)
    assert Oracle(*data, "float32").excess(over_ranks(contexts, 4, data, tile=TILE), output="float32") <= 1


@pytest.mark.parametrize("size", [1, 2])
def test_no_predictions_give_zero(contexts: list[Context], size: int) -> None:
    hidden, table, _ = draw(41, 1.0)
    found = over_ranks(contexts, size, (hidden[:0], table, torch.zeros(0, dtype=torch.int64)))
    assert found["loss"] == 0
    assert not found["table"].any()


@pytest.mark.parametrize("wrong", [-1, -100, 41])
def test_targets_that_are_no_items_are_refused(wrong: int) -> None:
    hidden, table, targets = draw(41, 1.0)
    targets[3] = wrong
    with pytest.raises(UnsupportedError, match=r"items must be in 0\.\.40"):
        item_loss(hidden, table, targets, Items(count=41))


def test_another_ranks_table_is_refused(contexts: list[Context]) -> None:
    tp = TensorParallel(group=contexts[0].group([0, 1]))
    with pytest.raises(UnsupportedError, match=r"rank 0 of 2 has items 0\.\.20, and a table of 41 rows"):
        item_loss(*draw(41, 1.0), Items(count=41, tp=tp))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives, and which operations there were."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.names = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.__name__)
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.untyped_storage().nbytes() // each.element_size())
        return out


def test_memory_is_a_tile_and_the_gradients(contexts: list[Context]) -> None:
    """Nothing of N x V, nor of a rank's N x V / 2, is made in forward or backward, and the plain loss makes it."""
    rows, items, tile = 300, 1000, Tile(rows=32, columns=64, kept=0)
    hidden, table = torch.randn(rows, 4), torch.randn(items, 4)
    targets = torch.randint(0, items, (rows,))

    def body(tp: TensorParallel) -> Largest:
        mine = Items(count=items, tp=tp)
        with Largest() as seen:
            own = table[mine.begin : mine.end]
            computed(lambda h, t: item_loss(h, t, targets, mine, tile=tile), hidden, own)
        return seen

    for seen in (body(ALONE), *over(contexts, 2, body)):
        assert "addmm_.default" in seen.names  # backward was seen too
        assert seen.numel <= max(tile.rows * tile.columns, items * 4, rows * 4)
    with Largest() as plain:
        computed(lambda h, t: F.cross_entropy(h @ t.T, targets, reduction="sum"), hidden, table)
    assert plain.numel >= rows * items


@pytest.mark.parametrize(("kept", "again"), [(N * 41, 0), (N * 41 - 1, 1), (N * 20, 2), (0, 3)])
def test_some_scores_are_kept_for_backward(kept: int, again: int) -> None:
    """Three tiles of up to 15 columns: their scores, both gradients, and the scores once more that had no room."""
    hidden, table, targets = draw(41, 1.0)
    tile = Tile(rows=N, columns=15, kept=kept)
    with Products() as seen:
        computed(lambda h, t: item_loss(h, t, targets, Items(count=41), tile=tile), hidden, table)
    assert seen.count == 3 * 3 + again


def test_a_backward_in_two_parts_uses_what_was_kept_twice() -> None:
    """I and then W, as a zero-bubble schedule has them: the bits of a backward in one."""
    hidden, table, targets = draw(41, 5.0)
    module = ItemTable(41, D)
    want = computed(lambda h, t: item_loss(h, t, targets, Items(count=41)), hidden, table)
    with torch.no_grad():
        module.embedding.copy_(table)
    states, queue = hidden.clone().requires_grad_(), WeightGradients(Deferrable.of(module))
    with queue.collect():
        loss = item_loss(states, module(), targets, module.items, owner=module)
    gradient = queue.backward(loss, x=states)
    assert module.embedding.grad is None
    queue.run()
    assert torch.equal(gradient, want["hidden"])
    assert torch.equal(module.embedding.grad, want["table"])


class Products(TorchDispatchMode):
    """How many matrix products there were."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__ in ("mm.default", "mm.out", "addmm_.default")
        return func(*args, **(kwargs or {}))


MUTANTS = {
    "the sum is not rescaled when the maximum rises": ("total.mul_((peak - higher).exp_())", "total"),
    "the maximum is forgotten": ("peak.copy_(higher)", "pass"),
    "backward forgets the row's weight": ("hidden_grad[rows].mul_(weight)", "pass"),
    "the table's gradient forgets it": ("chances.T, weighted", "chances.T, block"),
    "the target is not taken off": ("hidden_grad.index_add_(0, own", "hidden_grad.clone().index_add_(0, own"),
    "nor from the table": ("table_grad.index_add_(0, places", "table_grad.clone().index_add_(0, places"),
    "the last tile is left out": (
        "range(0, self.columns, self.width)",
        "range(0, self.columns - 7, 7)",
    ),
    "kept tiles go by the last maximum": (
        "kept.add(rows, scores, higher)",
        "kept.add(rows, scores, peak)",
    ),
    "kept tiles are probabilities of their tile": (
        "tile.mul_((peak - log_sum[rows]).exp_()[:, None])",
        "tile.div_(tile.sum(1)[:, None])",
    ),
}
KEPT_MUTANTS = [name for name in MUTANTS if name.startswith("kept")]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_control_bugs_planted_in_the_source_are_noticed(mutant: str) -> None:
    right, wrong = MUTANTS[mutant]
    text = Path(model.scores.__file__).read_text()
    assert text.count(right) == 1
    module = types.ModuleType("model.planted")
    sys.modules[module.__name__] = module
    try:
        exec(compile(text.replace(right, wrong), "planted", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    hidden, table, targets = draw(41, 5.0, torch.float64)

    def loss(sums: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
        tile = KEEPING if mutant in KEPT_MUTANTS else RAGGED
        columns = Columns(tp=ALONE, count=41, own=torch.arange(N), places=targets, tile=tile)
        return lambda h, t: 0.25 * torch.sub(*sums(h, t, columns)).sum()

    oracle = Oracle(hidden, table, targets, "float64", factor=0.25)
    assert oracle.excess(computed(loss(log_sums), hidden, table)) <= 1
    assert oracle.excess(computed(loss(module.log_sums), hidden, table)) > 1000
