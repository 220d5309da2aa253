"""Compression inside a node: ranks send payloads to the owners of shards, each with a residual of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm import _C, lower_payload
from hybridcomm import collective_plans as build
from hybridcomm.compress import by_link
from hybridcomm.context import Context
from hybridcomm.cost import KernelCost
from hybridcomm.errors import CompressorError, DataTypeError, PlanError, ResidualError, UnsupportedError
from hybridcomm.lower_payload import PayloadLowering
from hybridcomm.plan import Plan
from hybridcomm.residual import Residual
from hybridcomm.topology import Link, Topology
from tests.engine_ranks import engine_contexts
from tests.fake_context import make_fake_contexts
from tests.hybridcomm.compressed_calls import CODEC, Oracle, by_engine, gradients, held_back, residual_of
from tests.hybridcomm.law import Step, gap, run
from tests.hybridcomm.strategies import NAMED, topk
from tests.ranks import run_ranks

INTRA = "topk:0.2/b128"
BOTH = {"inter_node": CODEC, "intra_node": INTRA}
NAMES = ["2x2", "3+2", "2+1+1", "1x4", "3x1"]
SIZES = [1, 127, 128, 129, 1000, 20_011]


@pytest.fixture(params=NAMES, scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[list[Context]]:
    with engine_contexts(NAMED[request.param], chunk_nbytes=16384) as contexts:
        yield contexts


@pytest.mark.parametrize("exchange", ["gather", "two_stage"])
@pytest.mark.parametrize("numel", SIZES)
def test_engine_gives_the_interpreters_bytes_over_steps(
    ranks: list[Context], numel: int, exchange: str
) -> None:
    plan = ranks[0].plan_allreduce(numel, op="mean", compress=BOTH, exchange=exchange)
    plan.check()
    assert Plan.parse(plan.text) == plan
    steps = [gradients(len(ranks), numel, seed=10 * numel + step) for step in range(3)]
    Oracle().check_steps(ranks, plan, steps, compress=BOTH, exchange=exchange)


@pytest.mark.parametrize("compress", [{"intra_node": INTRA}, {"inter_node": None, "intra_node": INTRA}])
def test_the_node_alone_may_be_compressed(ranks: list[Context], compress: dict[str, str]) -> None:
    inputs = gradients(len(ranks), 9_001, seed=5)
    plan = ranks[0].plan_allreduce(9_001, op="mean", compress=compress)
    assert plan.compressor == "none"
    assert (plan.intra_compressor == "none") == (ranks[0].topology.K == 1)  # no peer, nothing to compress
    want = Oracle().run(plan, inputs, with_residual=False)
    got = by_engine(ranks, inputs, compress=compress)
    assert [a.tobytes() for a in got] == [b.tobytes() for b in want]


def test_payloads_inside_a_node_are_small_and_counted() -> None:
    """Two-sided: what goes to the owners shrinks by the codec's ratio; what comes back does not."""
    numel = 1 << 16
    inputs, sent = gradients(4, numel, seed=2), []
    with engine_contexts(NAMED["1x4"]) as contexts:
        for compress in (None, {"intra_node": "topk:0.01"}):
            before = sum(ctx.counters()["shm_bytes"] for ctx in contexts)
            by_engine(contexts, inputs, compress=compress)
            sent.append(sum(ctx.counters()["shm_bytes"] for ctx in contexts) - before)
    dense, small = sent
    payloads = 3 * sum(topk(0.01, 1024).nbytes(numel // 4) for _ in range(4))
    assert dense == 4 * numel * 4  # three quarters of each rank to the owners, and the sums once
    assert small == 4 * numel + payloads


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_nonfinite_value_reaches_all_ranks_and_leaves_all_residuals(
    ranks: list[Context], poison: float
) -> None:
    world, numel = len(ranks), 5_000
    residuals, inputs = [Residual() for _ in ranks], gradients(world, numel, seed=3)
    by_engine(ranks, inputs, compress=BOTH, residuals=residuals)
    for residual in residuals:
        residual.commit()
    before = [residual_of(residual).tobytes() for residual in residuals]
    for rank in range(world):
        spoilt = [values.copy() for values in inputs]
        spoilt[rank][numel // 2] = poison
        for result in by_engine(ranks, spoilt, compress=BOTH, residuals=residuals):
            assert not np.isfinite(result[numel // 2])
        for residual, old in zip(residuals, before, strict=True):
            residual.rollback()
            assert residual_of(residual).tobytes() == old


def law_gap(contexts: list[Context], forget: str = "") -> float:
    """The largest difference of the law's two sides; ``forget``: an op whose residual is dropped each step."""
    world, numel = len(contexts), 2048
    residuals = [Residual() for _ in contexts]
    seen, applied = np.zeros(numel), np.zeros(numel)
    for step in range(7):
        dice = np.random.default_rng(step)
        inputs = [dice.integers(-3, 4, numel).astype(np.float32) for _ in range(world)]
        update = by_engine(
            contexts, inputs, op="sum", compress=BOTH, residuals=residuals, exchange="two_stage"
        )[0]
        for residual in residuals:
            if step % 3 == 2:
                residual.rollback()
            else:
                residual.commit()
            for entry in residual._entries.values() if forget else ():
                begin = entry.layout.size(forget)
                entry.committed[begin : begin + 100] = 0
        if step % 3 != 2:
            seen += np.sum(inputs, axis=0, dtype=np.float64)
            applied += update.astype(np.float64)
    return float(np.abs(seen - applied - held_back(residuals, numel)).max())


@pytest.mark.parametrize("forget", ["", "compress", "recompress", "compress_intra"])
def test_law_with_all_residuals_is_an_equality(forget: str) -> None:
    with engine_contexts(Topology.from_sizes([2, 2, 1]), chunk_nbytes=16384) as contexts:
        assert (law_gap(contexts, forget) == 0) == (forget == "")


STEPS = st.lists(
    st.builds(Step, passes=st.integers(1, 2), spoilt=st.sampled_from(["no", "no", "skip", "inf"])),
    min_size=1,
    max_size=5,
).filter(lambda steps: any(step.spoilt == "no" for step in steps))


@given(steps=STEPS, name=st.sampled_from(["2x2", "2+1+1", "1x4"]))
@settings(max_examples=10)
def test_law_over_random_histories_of_a_reducer(steps: list[Step], name: str) -> None:
    """Equality: quarters are exact."""
    books = run_ranks(
        lambda ctx: run(ctx, steps, compress={"inter_node": "topk:0.1/b64", "intra_node": "topk:0.2/b64"}),
        make_fake_contexts(NAMED[name]),
    )
    assert all(not np.any(difference) for difference in gap(books).values())


# -- planted bugs --------------------------------------------------------------------------------------------


def first_payload_twice(lowering: Any, options: dict[str, Any]) -> None:
    options["divisor"] = 2


def wrong_codec(lowering: Any, options: dict[str, Any]) -> None:
    options["codec"] = 0


def one_residual_for_all(lowering: Any, options: dict[str, Any]) -> None:
    options["residual"] = 0


MUTANTS = {
    "the mean is taken inside the node as well": ("decode_add", first_payload_twice),
    "the codec of the other link": ("decode_add", wrong_codec),
    "all chunks share one residual": ("encode", one_residual_for_all),
}


@pytest.mark.parametrize("what", [None, *MUTANTS])
def test_mutants_differ_from_the_interpreter(monkeypatch: pytest.MonkeyPatch, what: str | None) -> None:
    prepare = PayloadLowering._prepare_payloads

    def mutated(self: Any, *args: Any) -> int:
        add = self._add

        def changed(kind: _C.Kind, stream: Any, step: Any, **options: Any) -> int:
            if what is not None and kind == getattr(_C.Kind, MUTANTS[what][0]):
                MUTANTS[what][1](self, options)
            return int(add(kind, stream, step, **options))

        self._add = changed
        return prepare(self, *args)

    monkeypatch.setattr(PayloadLowering, "_prepare_payloads", mutated)
    numel, oracle, good = 600, Oracle(), True
    with engine_contexts(NAMED["3+2"], timeout=2.0) as contexts:
        residuals = [Residual() for _ in contexts]
        plan = contexts[0].plan_allreduce(numel, op="mean", compress=BOTH)
        for step in range(3):
            inputs = gradients(5, numel, seed=step)
            want = oracle.run(plan, inputs)
            try:
                got = by_engine(contexts, inputs, compress=BOTH, residuals=residuals)
            except Exception:
                good = False
                break
            good &= [a.tobytes() for a in got] == [b.tobytes() for b in want]
    assert good is (what is None)


# -- requests, costs, state ----------------------------------------------------------------------------------


def test_requests_that_cannot_act_are_refused() -> None:
    for wrong in ({}, {"between": "topk"}, {"inter_node": "auto"}, {"intra_node": "wavelets"}):
        with pytest.raises(CompressorError):
            by_link(wrong)  # type: ignore[arg-type]
    assert by_link("topk").inter_node == "topk"
    with pytest.raises(UnsupportedError, match="slot"):
        build.allreduce(NAMED["1x4"], 5000, intra=topk(1.0, 64), chunk_elems=1024, chunk_nbytes=1024)
    with engine_contexts(NAMED["1x4"]) as contexts:
        for array, op, error in (
            (np.zeros(8), "sum", DataTypeError),
            (np.zeros(8, np.float32), "max", UnsupportedError),
        ):
            with pytest.raises(error):
                contexts[0].allreduce(array, op=op, compress={"intra_node": INTRA})
        with pytest.raises(UnsupportedError, match="exchange="):
            contexts[0].allreduce(np.zeros(8, np.float32), compress={"intra_node": INTRA}, exchange="gather")


def test_the_cost_counts_both_codecs() -> None:
    links = {"inter_node": Link(alpha=50e-6, beta=8e-9), "intra_node": Link(alpha=5e-6, beta=8e-9)}
    topology = replace(NAMED["2x2"], **links)
    codec, intra = topk(), topk(0.01, 1024)
    kernels = {str(c): KernelCost(encode=1e-10, clear=1e-10, decode=1e-10) for c in (codec, intra)}
    plans = [build.allreduce(topology, 1 << 18, compressor=codec, intra=i) for i in (None, intra)]
    dense, small = (plan.cost(topology, kernels=kernels) for plan in plans)
    assert dense / 2 < small < dense * 0.9  # on a slow link in the node half of its bytes remain
    with pytest.raises(PlanError, match="no kernel cost"):
        plans[1].cost(topology, kernels={str(codec): kernels[str(codec)]})


def test_a_residual_of_a_rank_is_never_dropped_in_silence() -> None:
    residual, regions = Residual(), {"compress": [(0, 4)], "compress_intra": [(4, 16)]}
    residual.stage("x", numel=16, regions={"compress": [(0, 4)]})[1][:] = 1
    residual.commit()
    e_in, e_out = residual.stage("x", numel=16, regions=regions)
    assert e_in.tolist() == [1] * 4 + [0] * 12
    e_out[:] = 2
    residual.commit()
    assert sorted(residual.state_dict()) == ["x[0:4]", "x[4:16] compress_intra"]
    with pytest.raises(ResidualError, match="keep one Residual"):
        residual.stage("x", numel=16, regions={"compress": [(0, 4)]})
    other = Residual()
    other.load_state_dict(residual.state_dict())
    with pytest.raises(ResidualError, match="compress_intra"):
        other.stage("x", numel=16, regions={"compress": [(0, 4)]})
    assert other.stage("x", numel=16, regions=regions)[0].tolist() == [2] * 16


def test_many_chunks_on_their_way_to_owners_do_not_run_out_of_scratch() -> None:
    topology, numel = Topology.virtual(1, 8), 120_000
    inputs = gradients(8, numel, seed=4)
    plan = build.allreduce(topology, numel, op="mean", intra=topk(), chunk_elems=1024)
    assert lower_payload.most_held(plan.for_rank(0), "compress_intra", "reduce_payload") > 1
    want = Oracle().run(plan, inputs, with_residual=False)
    with engine_contexts(topology, chunk_nbytes=4096) as contexts:
        got = by_engine(contexts, inputs, compress={"intra_node": CODEC})
    assert [a.tobytes() for a in got] == [b.tobytes() for b in want]
