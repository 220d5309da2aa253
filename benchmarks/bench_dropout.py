"""Dropout that follows tokens, beside torch's: ``python -m benchmarks.bench_dropout``.

Forward and backward in ms on one thread, medians of interleaved rounds. Limit: the same product with a mask that is
there already.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.table import table
from model.dropout import AttentionDropout, Dropout

P, CHANNELS, HEADS = 0.2, 64, 2
ROWS = (4, 16, 64)
TOKENS = 64
ROUNDS = 40


def milliseconds(drop: Callable[[Tensor], Tensor], x: Tensor) -> float:
    x.grad = None
    begin = time.perf_counter()
    drop(x).backward(x.detach())
    return 1e3 * (time.perf_counter() - begin)


def compared(name: str, x: Tensor, ours: Callable[[Tensor], Tensor]) -> list[str]:
    """A line of the table: torch's, ours, ratio, limit."""
    mask = (torch.rand_like(x) >= P) / (1 - P)
    arms = [lambda t: F.dropout(t, P), ours, lambda t: t * mask]
    times = [[milliseconds(arm, x) for arm in arms] for _ in range(ROUNDS)]
    theirs, own, limit = (statistics.median(column) for column in zip(*times, strict=True))
    return [name, f"{theirs:.3f}", f"{own:.3f}", f"{own / theirs:.2f}", f"{limit:.3f}", f"{own / limit:.1f}"]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stream = Dropout(P, place=0, channels=CHANNELS)
    weights = AttentionDropout(P, place=0, heads=range(HEADS))
    rows = []
    for count in ROWS:
        draws = torch.randint(2**62, (count, TOKENS))
        x = torch.randn(count, TOKENS, CHANNELS).requires_grad_()
        rows.append(compared(f"stream {list(x.shape)}", x, lambda t, d=draws: stream(t, d)))
        x = torch.randn(count, HEADS, TOKENS, TOKENS).requires_grad_()
        rows.append(compared(f"attention {list(x.shape)}", x, lambda t, d=draws: weights(t, d)))
    print(table(["fp32", "torch, ms", "ours, ms", "ours / torch", "mask given, ms", "ours / that"], rows))


if __name__ == "__main__":
    main()
