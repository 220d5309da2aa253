"""Schedules: texts, phases, owners that stay, and the residual law across changes of the codec and dense phases."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm import collective_plans as plans
from hybridcomm.bucket import BucketLayout
from hybridcomm.compress import resolve
from hybridcomm.errors import CompressorError, ResidualError, UnsupportedError
from hybridcomm.reducer import Reducer
from hybridcomm.residual import Residual
from hybridcomm.schedule import Schedule
from tests.conftest import MakeContexts
from tests.fake_context import make_fake_contexts
from tests.hybridcomm.exact_models import ExactNet
from tests.hybridcomm.law import SMALL_MB, Books, Step, gap, run
from tests.hybridcomm.strategies import NAMED, topologies
from tests.ranks import run_ranks

CODECS = st.sampled_from([None, "topk:0.1/b64", "topk:0.2/b16", "topk:0.05/b256", "topk:0.01"])
PHASES = st.lists(CODECS, min_size=1, max_size=4).flatmap(
    lambda codecs: st.lists(
        st.integers(1, 9), min_size=len(codecs) - 1, max_size=len(codecs) - 1, unique=True
    ).map(lambda steps: list(zip([0, *sorted(steps)], codecs, strict=True)))
)


@given(phases=PHASES)
def test_texts_round_trip_and_phases_begin_at_their_steps(phases: list[tuple[int, str | None]]) -> None:
    schedule = Schedule(*phases)
    assert Schedule.of(str(schedule)) == schedule
    assert Schedule.of(schedule) is schedule
    for step in range(12):
        want = [codec for first, codec in phases if first <= step][-1]
        got = schedule.at(step)
        assert (got and got.spec) == (want and resolve(want).spec)  # type: ignore[union-attr]
    assert schedule.dense_later == (len({codec is None for _, codec in phases}) == 2)


@pytest.mark.parametrize(
    "text", ["", "topk@5", "topk,none", "topk,none@0", "topk,none@x", "auto,none@5", "topc@0"]
)
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(CompressorError):
        Schedule.parse(text)
    with pytest.raises(CompressorError, match="ascend from 0"):
        Schedule((0, None), (7, "topk"), (7, None))


@given(topology=topologies(), phases=PHASES, numel=st.integers(1, 20_000))
@settings(max_examples=40)
def test_no_phase_moves_an_element_to_another_owner(topology: Any, phases: Any, numel: int) -> None:
    codecs = Schedule(*phases).codecs
    for rank in range(topology.world_size):
        residual = Residual()
        for codec in codecs:
            plan = plans.allreduce(topology, numel, op="mean", compressor=codec)
            residual.stage("t", numel=numel, regions=plan.residual_regions(rank))


def test_unaligned_codecs_would_move_elements() -> None:
    """The control: codecs as they are, not as a schedule aligns them."""
    residual = Residual()
    small, large = (
        plans.allreduce(NAMED["2x2"], 10_000, op="mean", compressor=resolve(text)).residual_regions(0)
        for text in ("topk:0.1/b64", "topk:0.01/b4096")
    )
    residual.stage("t", numel=10_000, regions=small)
    with pytest.raises(ResidualError, match="now asked for"):
        residual.stage("t", numel=10_000, regions=large)


# -- the law -------------------------------------------------------------------------------------------------

CHANGING = Schedule((0, None), (1, "topk:0.1/b64"), (3, None), (4, "topk:0.05/b256"), (5, "topk:0.1/b64"))
STEPS = [
    Step(),
    Step(),
    Step(passes=2),
    Step(spoilt="inf"),  # in a dense phase that delivers: rolled back, so the residual is delivered again
    Step(spoilt="skip"),
    Step(),
    Step(passes=2),
    Step(),
    Step(),
]


def holds(books: list[Books]) -> bool:
    return all(not np.any(difference) for difference in gap(books).values())


@pytest.mark.parametrize("name", ["2x2", "4x1", "2+1+1", "1x4"])
def test_law_across_changes_of_the_codec(make_contexts: MakeContexts, name: str) -> None:
    """Equality: integer gradients, four ranks."""
    contexts = make_contexts(NAMED[name])
    books = run_ranks(lambda ctx: run(ctx, STEPS, compress=CHANGING), contexts)
    assert [book.applied for book in books] == [7] * 4
    assert holds(books)


HISTORIES = st.lists(
    st.builds(Step, passes=st.integers(1, 2), spoilt=st.sampled_from(["no", "no", "no", "skip", "inf"])),
    min_size=2,
    max_size=6,
).filter(lambda steps: any(step.spoilt == "no" for step in steps))


@given(phases=PHASES, steps=HISTORIES)
@settings(max_examples=15)
def test_law_over_random_schedules(phases: Any, steps: list[Step]) -> None:
    contexts = make_fake_contexts(NAMED["2x2"])
    assert holds(run_ranks(lambda ctx: run(ctx, steps, compress=Schedule(*phases)), contexts))


def left(books: list[Books]) -> float:
    return sum(float(np.abs(values).sum()) for book in books for values in book.residual.values())


def test_a_dense_step_delivers_all_that_was_left(make_contexts: MakeContexts) -> None:
    schedule = Schedule((0, "topk:0.1/b64"), (2, None))
    contexts = make_contexts(NAMED["2x2"])
    compressed = run_ranks(lambda ctx: run(ctx, [Step()] * 2, compress=schedule), contexts)
    assert left(compressed) > 0
    contexts = make_contexts(NAMED["2x2"])
    dense = run_ranks(lambda ctx: run(ctx, [Step()] * 3, compress=schedule), contexts)
    assert left(dense) == 0
    assert holds(dense)


class ForgetsToClear(Reducer):
    """Delivers, and keeps what was delivered."""

    def _deliver(self, layout: BucketLayout, flat: torch.Tensor) -> None:
        super()._deliver(layout, flat)
        self.residual.rollback()


class ForgetsToDeliver(Reducer):
    """Clears without delivering."""

    def _deliver(self, layout: BucketLayout, flat: torch.Tensor) -> None:
        kept = flat.clone()
        super()._deliver(layout, flat)
        flat.copy_(kept)


class DeliversOnEveryRank(Reducer):
    """Multiplies what it delivers by the ranks of a node."""

    def _deliver(self, layout: BucketLayout, flat: torch.Tensor) -> None:
        kept = flat.clone()
        super()._deliver(layout, flat)
        flat.copy_(kept + 2 * (flat - kept))


@pytest.mark.parametrize("mutant", [ForgetsToClear, ForgetsToDeliver, DeliversOnEveryRank])
def test_planted_bugs_break_the_law(mutant: type[Reducer]) -> None:
    train = functools.partial(run, steps=[Step()] * 5, compress=CHANGING)
    assert not holds(run_ranks(lambda ctx: train(ctx, make=mutant), make_fake_contexts(NAMED["2x2"])))
    assert holds(run_ranks(train, make_fake_contexts(NAMED["2x2"])))


# -- steps are counted as they are applied --------------------------------------------------------------------


def train(ctx: Any, reducer: Reducer, model: ExactNet, *, applied: bool) -> str:
    """One step; what the table says was active in it."""
    active = reducer.table()
    model.zero_grad()
    model.loss(ctx.rank, 1).backward()
    reducer.finalize()
    (reducer.commit if applied else reducer.rollback)()
    return active


def test_skipped_steps_do_not_count_and_states_carry_the_count(make_contexts: MakeContexts) -> None:
    """One rank per node and one of four owns nothing: the count must not depend on holding a residual."""

    def rank(ctx: Any) -> None:
        def make() -> tuple[ExactNet, Reducer]:
            model = ExactNet()
            compress = "none,topk:0.1/b64@2"
            return model, Reducer(model, ctx=ctx, compress=compress, bucket_cap_mb=SMALL_MB)

        model, reducer = make()
        seen = [train(ctx, reducer, model, applied=applied) for applied in (True, False, False, True, True)]
        assert ["topk:0.1/b64/k6/v10 + dense" in text.splitlines()[2] for text in seen] == [False] * 4 + [
            True
        ], seen
        assert reducer.stats().applied == 3
        other_model, other = make()
        other.load_state_dict(reducer.state_dict())
        again = [train(ctx, r, m, applied=True) for r, m in ((other, other_model), (reducer, model))]
        assert again[0] == again[1]
        for name, values in reducer.residual.state_dict().items():
            assert np.array_equal(values, other.residual.state_dict()[name])

    run_ranks(rank, make_contexts(NAMED["2x2"]))


def test_momentum_cannot_pass_a_dense_phase(make_contexts: MakeContexts) -> None:
    def rank(ctx: Any) -> None:
        with pytest.raises(UnsupportedError, match="begin with a high ratio"):
            Reducer(ExactNet(), ctx=ctx, compress="none,topk@5", residual=Residual(momentum=0.9))
        with pytest.raises(UnsupportedError, match="begin with"):
            Residual(momentum=0.5).deliver("t", np.zeros(4, np.float32), regions=[(0, 4)])

    run_ranks(rank, make_contexts(NAMED["2x2"]))
