"""The loss over all items in tiles, beside cross-entropy on the table of scores: ``python -m benchmarks.bench_loss``.

Forward and backward in ms on one thread, the fastest of some interleaved rounds; inputs as after a final norm.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.table import table
from model.vocab import Items, item_loss

SHAPES = ((2000, 2000, 64), (8000, 2000, 64), (2000, 30_000, 64), (2000, 30_000, 256), (2000, 63_001, 64))
"""(predictions, items, dim)."""
ROUNDS = 5

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ items.T, targets, reduction="sum")


def tiled(hidden: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    return item_loss(hidden, items, targets, Items(count=len(items)))


def milliseconds(loss: Loss, *inputs: Tensor) -> float:
    for each in inputs:
        each.grad = None
    begin = time.perf_counter()
    loss(*inputs).backward()
    return 1e3 * (time.perf_counter() - begin)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for predictions, count, dim in SHAPES:
        hidden, items = (
            torch.randn(predictions, dim).requires_grad_(),
            (torch.randn(count, dim) * 0.3).requires_grad_(),
        )
        targets = torch.randint(0, count, (predictions,))
        times = [
            [milliseconds(loss, hidden, items, targets) for loss in (plain, tiled)] for _ in range(ROUNDS)
        ]
        best = [min(column) for column in zip(*times, strict=True)]
        rows.append(
            [
                str(predictions),
                str(count),
                str(dim),
                *(f"{ms:.0f}" for ms in best),
                f"{best[1] / best[0]:.2f}",
            ]
        )
    print(table(["predictions", "items", "dim", "table of scores, ms", "tiles, ms", "share"], rows))


if __name__ == "__main__":
    main()
