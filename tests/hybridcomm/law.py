"""The residual law, as a training run that keeps the books.

    sum over applied steps and ranks of gradients = W * sum of applied mean updates + sum of all residuals

Gradients are booked by tensor hooks, before anything of the library sees them; updates by the gradients that
the optimizer used; residuals by ``state_dict``. A run returns the difference of the two sides, per element.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hybridcomm.reducer import Reducer
from tests.hybridcomm.exact_models import ExactNet

COMPRESS = "topk:0.1/b64"
SMALL_MB = 400 / (1 << 20)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step: backward passes to accumulate, and whether the step is spoilt on one rank."""

    passes: int = 1
    spoilt: str = "no"  # "inf": one rank's loss is Inf; "skip": the caller does not step and rolls back


@dataclass
class Books:
    """What one rank saw over the run, by parameter; float64 sums, exact for the integers used."""

    gradients: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    updates: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    magnitudes: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    residual: dict[str, Any] = field(default_factory=dict)
    applied: int = 0
    scales: list[float] = field(default_factory=list)


def add(book: dict[str, np.ndarray[Any, Any]], name: str, value: torch.Tensor, times: float = 1.0) -> None:
    array = value.detach().double().numpy() * times
    book[name] = book.get(name, np.zeros_like(array)) + array


def noisy_model(noise: float) -> ExactNet:
    model, generator = ExactNet(), torch.Generator().manual_seed(5)
    if noise:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model


def run(
    ctx: Any,
    steps: Sequence[Step],
    *,
    scaler: torch.amp.GradScaler | None = None,
    make: Callable[..., Reducer] = Reducer,
    noise: float = 0.0,
    compress: Any = COMPRESS,
) -> Books:
    """Trains one rank; ``make`` builds the reducer (planted mutants), ``noise`` real gradients."""
    model, books = noisy_model(noise), Books()
    reducer = make(model, ctx=ctx, compress=compress, bucket_cap_mb=SMALL_MB)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # parameters stay, so gradients stay integers
    reducer.attach(optimizer, scaler=scaler)
    unit = [1.0]
    this_step: dict[str, np.ndarray[Any, Any]] = {}
    this_size: dict[str, np.ndarray[Any, Any]] = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda g, name=name: add(this_step, name, g, 1.0 / unit[0]))
        parameter.register_hook(lambda g, name=name: add(this_size, name, g.abs(), 1.0 / unit[0]))

    def book_update(*_: object) -> None:
        books.applied += 1
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            add(books.updates, name, parameter.grad)
            books.gradients[name] = books.gradients.get(name, 0) + this_step[name]
            books.magnitudes[name] = books.magnitudes.get(name, 0) + this_size[name]

    optimizer.register_step_post_hook(book_update)
    for number, step in enumerate(steps):
        model.zero_grad()
        this_step.clear()
        this_size.clear()
        unit[0] = scaler.get_scale() if scaler else 1.0
        books.scales.append(unit[0])
        for turn in range(step.passes):
            loss = model.loss(ctx.rank, 10 * number + turn)
            if step.spoilt == "inf" and turn == 0 and ctx.rank == 1:
                loss = loss * float("inf")
            loss = scaler.scale(loss) if scaler else loss
            if turn < step.passes - 1:
                with reducer.no_sync():
                    loss.backward()
            else:
                loss.backward()
        reducer.finalize()
        if step.spoilt == "skip":
            reducer.rollback()
        elif scaler:
            scaler.step(optimizer)
            scaler.update()
        elif step.spoilt == "no":
            optimizer.step()
    if reducer.residual.pending:  # the last step was skipped: what the next backward would find out
        reducer.rollback()
    books.residual = reducer.residual.state_dict()
    return books


def gap(books: Sequence[Books]) -> dict[str, np.ndarray[Any, Any]]:
    """Left side minus right side of the law, per parameter and element."""
    out = {}
    for name, updates in books[0].updates.items():
        residual = np.zeros(updates.size)
        for book in books:
            for key, values in book.residual.items():
                match = re.fullmatch(re.escape(name) + r"\[(\d+):(\d+)\](?: \w+)?", key)
                if match:
                    residual[int(match[1]) : int(match[2])] += values
        left = np.sum([book.gradients[name] for book in books], axis=0)
        out[name] = left - len(books) * updates - residual.reshape(updates.shape)
    return out
