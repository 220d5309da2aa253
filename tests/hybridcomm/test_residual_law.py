"""Nothing is lost: gradients in = updates out + residuals kept, over everything a training loop may do."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm.bucket import BucketLayout
from hybridcomm.reducer import Reducer
from tests.conftest import MakeContexts
from tests.fake_context import make_fake_contexts
from tests.hybridcomm.law import Books, Step, gap, run
from tests.hybridcomm.strategies import NAMED, topologies
from tests.numerics import gamma
from tests.ranks import run_ranks

PLAIN = [Step()] * 4
MIXED = [
    Step(),
    Step(passes=3),
    Step(spoilt="skip"),
    Step(),
    Step(passes=2, spoilt="inf"),
    Step(passes=2),
    Step(spoilt="inf"),
    Step(),
]


def books_of(contexts: list[Any], steps: list[Step], **options: Any) -> list[Books]:
    return run_ranks(lambda ctx: run(ctx, steps, **options), contexts)


def exchanging(exchange: str) -> functools.partial[Reducer]:
    return functools.partial(Reducer, exchange=exchange)


def holds(books: list[Books]) -> bool:
    return all(not np.any(difference) for difference in gap(books).values())


@pytest.mark.parametrize("exchange", ["gather", "two_stage"])
@pytest.mark.parametrize("name", ["2x2", "4x1", "2+1+1", "1x4"])
def test_law_over_skips_accumulation_and_infinities(
    make_contexts: MakeContexts, name: str, exchange: str
) -> None:
    """Equality: integer gradients, four ranks; decoded values are integers, quarters exact."""
    books = books_of(make_contexts(NAMED[name]), MIXED, make=exchanging(exchange))
    assert [book.applied for book in books] == [5] * 4
    assert holds(books)
    for stage in ("]", "recompress") if exchange == "two_stage" else ("]",):
        kept = [np.abs(v).sum() for book in books for key, v in book.residual.items() if key.endswith(stage)]
        assert (sum(kept) > 0) == (name != "1x4"), "without residuals the law would hold for doing nothing"


@pytest.mark.parametrize("compress", ["bf16", "fp8:e5m2/g16", "int8/g16", "int4/g16", "sign1/g16"])
def test_law_of_the_quantisers(make_contexts: MakeContexts, compress: str) -> None:
    books = books_of(make_contexts(NAMED["2+1+1"]), MIXED, compress=compress)
    assert [book.applied for book in books] == [5] * 4
    assert holds(books)


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, backoff_factor=0.25)


def test_law_over_growth_and_backoff_of_the_loss_scale(make_contexts: MakeContexts) -> None:
    steps = [
        Step(),
        Step(),
        Step(passes=2),
        Step(spoilt="inf"),
        Step(),
        Step(),
        Step(),
        Step(spoilt="inf"),
        Step(),
    ]
    contexts = make_contexts(NAMED["2x2"])
    books = run_ranks(lambda ctx: run(ctx, steps, scaler=scaler()), contexts)
    assert [book.applied for book in books] == [7] * 4
    changes = [after - before for before, after in pairwise(books[0].scales)]
    assert max(changes) > 0
    assert min(changes) < 0
    assert holds(books)


STEPS = st.lists(
    st.builds(Step, passes=st.integers(1, 3), spoilt=st.sampled_from(["no", "no", "no", "skip", "inf"])),
    min_size=1,
    max_size=6,
).filter(lambda steps: any(step.spoilt == "no" for step in steps))


@given(steps=STEPS, scaled=st.booleans(), exchange=st.sampled_from(["gather", "two_stage"]))
@settings(max_examples=25)
def test_law_over_random_histories(steps: list[Step], scaled: bool, exchange: str) -> None:
    if (
        scaled
    ):  # with a scaler the scaler decides; a caller that skips on its own keeps the scaler's state odd
        steps = [Step(passes=step.passes, spoilt="inf" if step.spoilt != "no" else "no") for step in steps]
    contexts, make = make_fake_contexts(NAMED["2x2"]), exchanging(exchange)
    body = functools.partial(run, steps=steps, make=make)
    assert holds(run_ranks(lambda ctx: body(ctx, scaler=scaler() if scaled else None), contexts))


@given(topology=topologies(), seed=st.integers(1, 5), exchange=st.sampled_from(["gather", "two_stage"]))
@settings(max_examples=20)
def test_law_on_real_numbers_and_any_topology(topology: Any, seed: int, exchange: str) -> None:
    """Within the roundings of one step, times steps, element by element.

    Rounded per step: accumulation in p.grad, W - 1 in-node sums, the compensation, weight and sum of M
    decoded values. Decoding and residual are exact (acc = decoded + e_out); an element's residual never
    exceeds what was booked for that element, its decoded value at most doubles that, and later steps round it
    again. In two stages the sum of M decoded values is compensated and decoded again, which at most doubles it
    again.
    """
    steps = [Step(), Step(passes=2), Step()]
    books = books_of(make_fake_contexts(topology), steps, noise=0.1 * seed, make=exchanging(exchange))
    rounds = 1 + topology.world_size + 1 + 2 * len(topology.nodes) + 1
    doubled = 2
    if exchange == "two_stage":
        rounds, doubled = rounds + len(topology.nodes) + 2, 4
    for name, difference in gap(books).items():
        booked = np.sum([book.magnitudes[name] for book in books], axis=0)
        assert np.all(np.abs(difference) <= gamma(rounds * len(steps), "float32") * doubled * booked), name


# -- planted bugs: each must break the law -------------------------------------------------------------------


class ForgetsLastBucket(Reducer):
    """Memoryless in the last bucket."""

    def _launch(self, layout: BucketLayout) -> Any:
        if layout.index < len(self.layouts) - 1:
            return super()._launch(layout)
        flat = self._flats[layout.index]
        return self.ctx.allreduce(
            flat,
            op="mean",
            compress=self.schedules[layout.index].at(0),
            async_op=True,
            residual_key=layout.key,
        )


class CommitsEarly(Reducer):
    """Commits before the step is known to be applied."""

    def finalize(self) -> None:
        super().finalize()
        self.commit()


class StaleScale(Reducer):
    """Takes out the loss scale of the step before."""

    _before = 2.0**10

    def _unit(self) -> float:
        stale, self._before = self._before, super()._unit()
        return stale

    def _unpack(self, layout: BucketLayout) -> None:
        self._scale = self._before
        super()._unpack(layout)


class AveragesTwice(Reducer):
    """Divides by the world size again."""

    def _unpack(self, layout: BucketLayout) -> None:
        self._flats[layout.index].div_(self.ctx.world_size)
        super()._unpack(layout)


class SkipsAverage(Reducer):
    """Sums where it should average."""

    def _unpack(self, layout: BucketLayout) -> None:
        self._flats[layout.index].mul_(self.ctx.world_size)
        super()._unpack(layout)


class NeverRollsBack(Reducer):
    """Keeps the residual of a skipped step."""

    def rollback(self) -> None:
        self.commit()


class RollsBackOneBucket(Reducer):
    """Rolls back only one entry of the residual."""

    def rollback(self) -> None:
        entries = list(self.residual._entries.values())
        for entry in entries[1:]:
            entry.committed, entry.spare = entry.spare, entry.committed
        super().rollback()


class DropsSecondResidual(Reducer):
    """Keeps nothing of what the second stage left out."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, exchange="two_stage", **options)

    def finalize(self) -> None:
        super().finalize()
        for entry in self.residual._entries.values():
            entry.spare[entry.layout.size("recompress") :] = 0


SKIPS = [Step(), Step(spoilt="skip"), Step()]
SCALED = [Step(), Step(), Step(), Step(spoilt="inf"), Step()]


@pytest.mark.parametrize(
    ("mutant", "steps", "scaled"),
    [
        (ForgetsLastBucket, PLAIN, False),
        (CommitsEarly, SKIPS, False),
        (StaleScale, SCALED, True),
        (AveragesTwice, PLAIN, False),
        (SkipsAverage, PLAIN, False),
        (NeverRollsBack, SKIPS, False),
        (RollsBackOneBucket, SKIPS, False),
        (DropsSecondResidual, PLAIN, False),
    ],
)
def test_planted_bugs_break_the_law(mutant: type[Reducer], steps: list[Step], scaled: bool) -> None:
    contexts = make_fake_contexts(NAMED["2x2"])
    make = functools.partial(run, steps=steps, make=mutant)
    assert not holds(run_ranks(lambda ctx: make(ctx, scaler=scaler() if scaled else None), contexts))
    contexts = make_fake_contexts(NAMED["2x2"])
    control = functools.partial(run, steps=steps)
    assert holds(run_ranks(lambda ctx: control(ctx, scaler=scaler() if scaled else None), contexts))
