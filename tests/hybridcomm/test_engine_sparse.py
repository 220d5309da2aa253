"""Sparse and low-rank codecs on the real engine: the plan interpreter's bytes, seeds, the residual law."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hybridcomm.compress import ByLink, resolve
from hybridcomm.context import Context
from hybridcomm.errors import UnsupportedError
from hybridcomm.residual import Residual
from tests.engine_ranks import each_rank, engine_contexts
from tests.hybridcomm.compressed_calls import Oracle, by_engine, gradients, held_back, next_call
from tests.hybridcomm.strategies import NAMED
from tests.numerics import gamma

EXACT = ("topk:0.1+int8/b64", "topk:0.1+sign/b64", "gtop1:0.1/k16", "gtopk:0.1/b64", "randk:0.1")
"""Codecs whose decoded values and residuals add up without rounding."""

CODECS = (*EXACT, "randk:0.1+unbiased", "powersgd:2/b16")


@pytest.fixture(params=["2x2", "3+2", "4x1"], scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[list[Context]]:
    with engine_contexts(NAMED[request.param]) as contexts:
        yield contexts


EXCHANGES = ("gather", "two_stage")
LINKS = [
    {"inter_node": inter, "intra_node": intra}
    for inter, intra in (
        ("randk:0.1", "randk:0.2"),
        ("gtopk:0.1/b64", "topk:0.1/b64"),
        ("topk:0.1/b64", "gtopk:0.2/b64"),
        ("gtopk:0.1/b64", "gtopk:0.2/b64"),
        ("powersgd:2/b16", "gtop1:0.1/k16"),
    )
]
"""Also codecs that take whole regions, on either class of links or on both."""


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("numel", [1, 1009, 20_011])
def test_engine_gives_the_interpreters_bytes(
    ranks: list[Context], codec: str, numel: int, exchange: str
) -> None:
    inputs = gradients(len(ranks), numel, seed=numel)
    plan = ranks[0].plan_allreduce(numel, op="mean", compress=codec, exchange=exchange)
    want = Oracle().run(plan, inputs, with_residual=False, call=next_call(ranks))
    got = by_engine(ranks, inputs, compress=codec, exchange=exchange)
    assert [a.tobytes() for a in got] == [b.tobytes() for b in want]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("compress", [*(codec for codec in CODECS if "unbiased" not in codec), *LINKS])
def test_error_feedback_over_steps_equals_the_interpreter(
    ranks: list[Context], compress: ByLink, exchange: str
) -> None:
    plan = ranks[0].plan_allreduce(5003, op="mean", compress=compress, exchange=exchange)
    plan.check()
    assert plan.exchange == exchange
    steps = [gradients(len(ranks), 5003, seed=100 + step) for step in range(3)]
    Oracle().check_steps(ranks, plan, steps, next_call(ranks), compress=compress, exchange=exchange)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("codec", EXACT)
def test_residual_law(ranks: list[Context], codec: str, exchange: str) -> None:
    """Gradients = applied sums + residuals, exactly, across a skipped step: all values are small integers."""
    world, numel = len(ranks), 2048
    residuals = [Residual() for _ in ranks]
    seen, applied = np.zeros(numel), np.zeros(numel)
    for step in range(5):
        dice = np.random.default_rng(step)
        inputs = [dice.integers(-3, 4, numel).astype(np.float32) for _ in range(world)]
        update = by_engine(ranks, inputs, op="sum", compress=codec, residuals=residuals, exchange=exchange)[0]
        if step == 2:
            for residual in residuals:
                residual.rollback()
            continue
        for residual in residuals:
            residual.commit()
        seen += np.sum(inputs, axis=0, dtype=np.float64)
        applied += update.astype(np.float64)
    left = held_back(residuals, numel)
    assert (seen == applied + left).all()
    assert np.abs(applied).sum() > 0
    assert np.abs(left).sum() > 0, "nothing was held back: the law was not tested"


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_residual_law_to_rounding(ranks: list[Context], exchange: str) -> None:
    """powersgd subtracts real values: the law holds to one rounding per node and step, and that of sums."""
    codec, world, numel, steps = "powersgd:2/b16", len(ranks), 2048, 4
    residuals = [Residual() for _ in ranks]
    seen, applied, size = np.zeros(numel), np.zeros(numel), np.zeros(numel)
    for step in range(steps):
        inputs = [
            np.random.default_rng([step, r]).integers(-3, 4, numel).astype(np.float32) for r in range(world)
        ]
        update = by_engine(ranks, inputs, op="sum", compress=codec, residuals=residuals, exchange=exchange)[0]
        for residual in residuals:
            residual.commit()
        seen += np.sum(inputs, axis=0, dtype=np.float64)
        applied += update
        size += np.abs(inputs).sum(axis=0) + np.abs(update)
    left = held_back(residuals, numel)
    nodes = len(ranks[0].topology.nodes)
    # Each step compensates (1), subtracts (1) and adds payloads (nodes), of values that are no larger than all seen.
    bound = gamma(steps * (nodes + 2), "float32") * nodes * (size + np.abs(left)).max()
    assert np.abs(seen - applied - left).max() <= bound
    assert np.abs(left).max() > bound, "nothing was held back: the law was not tested"
    assert np.abs(applied).max() > bound


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_shard_of_many_chunks_is_compressed_whole(exchange: str) -> None:
    """Slots far smaller than a shard: in-node steps go chunk by chunk, the selection is still over all of it."""
    inputs, codec = gradients(4, 30_011, seed=4), "gtopk:0.01"
    with engine_contexts(NAMED["2x2"], chunk_nbytes=4096) as contexts:
        plan = contexts[0].plan_allreduce(30_011, op="mean", compress=codec, exchange=exchange)
        slices = 2 if exchange == "two_stage" else 1
        made = [s for s in plan.steps if s.op == "compress"]
        assert len(made) == 4 * slices
        assert sum(step.op == "reduce" for step in plan.steps) > 4 * len(made)
        want = Oracle().run(plan, inputs, with_residual=False, call=next_call(contexts))
        got = by_engine(contexts, inputs, compress=codec, exchange=exchange)
    assert [a.tobytes() for a in got] == [b.tobytes() for b in want]


@pytest.mark.parametrize("inter", [None, "topk:0.1/b64", "gtopk:0.1/b64"])
def test_a_shard_that_is_compressed_whole_inside_a_node_may_be_longer_than_a_slot(inter: str | None) -> None:
    """Its payload has to fit, and what owners hand back goes chunk by chunk."""
    inputs, compress = gradients(4, 30_011, seed=4), {"inter_node": inter, "intra_node": "gtopk:0.01"}
    with engine_contexts(NAMED["2x2"], chunk_nbytes=4096) as contexts:
        plan = contexts[0].plan_allreduce(30_011, op="mean", compress=compress)
        offers = [s.region.numel for s in plan.steps if s.op == "compress_intra"]
        assert len(offers) == 4
        assert 4 * min(offers) > 4096
        want = Oracle().run(plan, inputs, with_residual=False)
        got = by_engine(contexts, inputs, compress=compress)
        with pytest.raises(UnsupportedError, match="slot of the shared memory"):
            contexts[0].plan_allreduce(1 << 20, compress=compress)
    assert [a.tobytes() for a in got] == [b.tobytes() for b in want]


def test_draws_differ_per_call_and_repeat_in_another_run() -> None:
    inputs = gradients(4, 4096, seed=1)
    runs = []
    for _ in range(2):
        with engine_contexts(NAMED["2x2"]) as contexts:
            runs.append([by_engine(contexts, inputs, compress="randk:0.1")[0].tobytes() for _ in range(3)])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 3


def test_an_unbiased_codec_takes_no_error_feedback(ranks: list[Context]) -> None:
    def body(rank: int) -> None:
        ranks[rank].allreduce(np.ones(64, np.float32), compress="randk:0.1+unbiased", residual=Residual())

    assert resolve("randk:0.1+unbiased") is not None
    assert all(isinstance(error, UnsupportedError) for error in each_rank(body, len(ranks)))
