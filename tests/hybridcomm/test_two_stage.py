"""The two-stage exchange: its plan, its choice, and the state of its residuals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcomm import policy
from hybridcomm.auto import Policy
from hybridcomm.compress import Compressor, resolve
from hybridcomm.cost import KernelCost
from hybridcomm.errors import ResidualError, UnsupportedError
from hybridcomm.plan import Plan
from hybridcomm.probe import Figures
from hybridcomm.residual import Residual
from hybridcomm.topology import Link, Topology
from tests.engine_ranks import engine_contexts
from tests.fake_context import make_fake_contexts
from tests.hybridcomm.compressed_calls import Oracle, by_engine, gradients
from tests.hybridcomm.strategies import NAMED, topk, topologies, two_stage
from tests.interpreter import Interpreter
from tests.numerics import sum_tolerance, topk_error_bound
from tests.ranks import run_ranks

NAMES = ["2x2", "4x1", "3+2", "2+1+1", "3x1"]
SIZES = [1, 64, 129, 255, 256, 257, 5003]
"""Fewer blocks (of 64) than nodes; around the edges of blocks and slices; several of each."""

split = topologies().filter(lambda topology: len(topology.nodes) > 1)


# -- the plan ------------------------------------------------------------------------------------------------


@given(topology=split, numel=st.integers(1, 3000), chunk=st.sampled_from([64, 256, 1024]))
@settings(max_examples=40)
def test_a_slice_is_whole_blocks_and_belongs_to_one_owner(topology: Topology, numel: int, chunk: int) -> None:
    plan = two_stage(topology, numel, chunk_elems=chunk)
    plan.check()
    assert plan.exchange == "two_stage"
    assert "exchanged in two stages" in plan.text
    assert Plan.parse(plan.text) == plan
    second = []
    for rank in range(topology.world_size):
        own = plan.residual_regions(rank, "recompress")
        assert set(own) <= set(
            plan.residual_regions(rank)
        )  # so that it can be taken up by the first residual
        second += own
    assert sum(region.numel for region in second) == numel
    assert len(set(second)) == len(second)
    assert all(region.begin % 64 == 0 for region in second)


def test_each_owner_sends_two_parts_of_its_payload() -> None:
    """2 (M - 1) / M of a payload, against M - 1 of them; counted by the interpreter and known beforehand."""
    topology, numel, codec = Topology.virtual(5, 2), 10 * 4096, topk()
    sent = {}
    for exchange in ("gather", "two_stage"):
        plan = two_stage(topology, numel, exchange=exchange)
        interpreter = Interpreter(plan)
        interpreter.run([np.ones(numel, np.float32) for _ in range(10)])
        assert sum(interpreter.wire_nbytes.values()) == plan.wire_nbytes(codec.nbytes)
        sent[exchange] = [interpreter.wire_nbytes[rank] for rank in range(10)]
    assert sent["gather"] == [4 * codec.nbytes(numel // 2)] * 10
    assert sent["two_stage"] == [2 * 4 * codec.nbytes(numel // 10)] * 10


@pytest.mark.parametrize("name", [*NAMES, "interleaved"])
def test_what_loses_nothing_gives_the_sum(name: str) -> None:
    """k = block and sums on the codec's grid: both stages keep everything, so equality is demanded."""
    topology, codec = NAMED[name], topk(1.0, 64)
    half = (1 << (codec.spec.layout[2] - 1)) // (2 * topology.world_size)
    dice = np.random.default_rng(7)
    for numel in SIZES:
        terms = dice.integers(0, half, (topology.world_size, numel)).astype(np.float32)
        buffers = list(terms.copy())
        Interpreter(two_stage(topology, numel, compressor=codec, chunk_elems=512)).run(buffers)
        assert all(got.tobytes() == terms.sum(axis=0).tobytes() for got in buffers)


@given(topology=split, numel=st.integers(200, 3000), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_it_errs_within_two_bounds(topology: Topology, numel: int, seed: int) -> None:
    """Not more than the nodes' codecs and that of the slices may lose, and more than nothing."""
    block, k, bits = topk().spec.layout
    terms = np.random.default_rng(seed).standard_normal((topology.world_size, numel)).astype(np.float32)
    buffers = list(terms.copy())
    Interpreter(two_stage(topology, numel)).run(buffers)
    sums = [terms[list(ranks)].astype(np.float64).sum(axis=0) for ranks in topology.nodes]
    error = float(np.linalg.norm(buffers[0] - np.sum(sums, axis=0)))
    first = sum(topk_error_bound(node, block=block, k=k, value_bits=bits) ** 0.5 for node in sums)
    passed = float(np.linalg.norm(np.sum(sums, axis=0))) + first  # the energy that the second stage sees
    second = passed * (1 + 2.0 ** (3 - bits))
    rounding = float(np.linalg.norm(sum_tolerance(terms, "float32", extra=2 * len(sums))))
    assert 0.0 < error <= first + second + rounding
    assert all(got.tobytes() == buffers[0].tobytes() for got in buffers)


# -- the choice ----------------------------------------------------------------------------------------------


@given(
    nodes=st.integers(2, 500),
    nbytes=st.integers(0, 1 << 30),
    alpha=st.floats(0, 1),
    beta=st.floats(0, 1e-6),
    numel=st.integers(0, 1 << 30),
)
def test_two_stages_are_chosen_where_they_halve_the_time_on_the_link(
    nodes: int, nbytes: int, alpha: float, beta: float, numel: int
) -> None:
    def chosen(**other: float) -> str:
        given = {"nodes": nodes, "payload_nbytes": nbytes, "shard_numel": 0, "alpha": alpha, "beta": beta}
        return policy.exchange(**{**given, **other})  # type: ignore[arg-type]

    gather = alpha + (nodes - 1) * nbytes * beta
    stages = 2 * alpha + 2 * (nodes - 1) / nodes * (nbytes * beta)
    assert (chosen() == "two_stage") == (stages < policy.EXCHANGE_GAIN * gather)
    if nodes <= policy.GATHERING_NODES:
        assert chosen() == "gather"
    if chosen(shard_numel=numel) == "two_stage":  # kernels take their time either way
        assert chosen() == chosen(nodes=nodes + 1) == "two_stage"


def test_auto_goes_by_measured_links_where_there_are_any() -> None:
    wide = Topology.virtual(16, 1)

    def chosen(topology: Topology, numel: int) -> str:
        return two_stage(topology, numel, exchange="auto").exchange

    assert chosen(wide, 64) == "gather"
    assert chosen(wide, 1 << 20) == "two_stage"
    far = replace(wide, inter_node=Link(alpha=0.1, beta=1e-9))
    assert chosen(far, 1 << 20) == "gather"
    slow = replace(wide, inter_node=Link(alpha=1e-9, beta=1e-6))
    assert chosen(slow, 64) == "two_stage"
    assert chosen(Topology.virtual(4, 1), 1 << 22) == "gather"
    assert two_stage(NAMED["1x4"], 5000).exchange == "none"


def measured(nodes: int, beta: float, codec: Compressor) -> Policy:
    links = {"inter_node": Link(alpha=50e-6, beta=beta), "intra_node": Link(alpha=1e-6, beta=1e-10)}
    kernels = {str(codec): KernelCost(encode=1e-9, clear=2e-10, decode=1e-10)}
    topology = replace(Topology.virtual(nodes, 1), **links)
    return Policy(figures=Figures(topology=topology, kernels=kernels), candidates=(codec,))


def test_auto_compression_chooses_by_the_predicted_times_of_both_exchanges() -> None:
    codec, numel, answers = topk(0.01, 1024), 1 << 20, {}
    for nodes in (4, 6, 16):
        for beta in (8e-9, 80e-9):
            chosen = measured(nodes, beta, codec)
            found = chosen.decide(numel)
            plan, other = (
                two_stage(chosen.figures.topology, numel, compressor=codec, exchange=exchange).cost(
                    chosen.figures.topology, kernels=chosen.figures.kernels
                )
                for exchange in (found.exchange, "gather")
            )
            assert found.seconds[str(codec)] == plan
            assert (found.exchange == "two_stage") == (plan < policy.EXCHANGE_GAIN * other)
            answers[nodes, beta] = found.exchange
            assert chosen.decide(numel, exchange="two_stage").exchange == "two_stage"
    assert answers[4, 80e-9] == answers[6, 8e-9] == "gather"
    assert answers[16, 80e-9] == "two_stage"
    assert "in two stages" in measured(16, 80e-9, codec).table([1 << 22])


def test_auto_compression_carries_out_the_exchange_that_it_chose() -> None:
    with engine_contexts(Topology.virtual(3, 1)) as contexts:
        for context in contexts:
            context.policies["auto"] = measured(3, 80e-9, topk())
        plans = [
            contexts[0].plan_allreduce(5000, compress="auto", exchange=exchange).exchange
            for exchange in ("auto", "gather", "two_stage")
        ]
        assert plans == ["gather", "gather", "two_stage"]
        inputs = gradients(3, 5000, seed=1)
        got = by_engine(contexts, inputs, compress="auto", exchange="two_stage")
    want = Oracle().run(two_stage(Topology.virtual(3, 1), 5000, op="mean"), inputs, with_residual=False)
    assert [a.tobytes() for a in got] == [b.tobytes() for b in want]


def test_a_reducer_keeps_to_the_exchange_that_auto_decided_with() -> None:
    """Half of the bytes pay on six nodes in two stages alone: where a gather is asked for, dense is the answer."""
    from torch import nn

    from hybridcomm.reducer import Reducer

    def ways(ctx: Any, exchange: str) -> tuple[list[str], tuple[str, ...]]:
        module = nn.Linear(256, 512, bias=False)
        reducer = Reducer(module, ctx=ctx, compress="auto", exchange=exchange)
        return [str(schedule) for schedule in reducer.schedules], reducer.exchanges

    codec = resolve("fp16")
    assert codec is not None
    with engine_contexts(Topology.virtual(6, 1)) as contexts:
        for context in contexts:
            context.policies["auto"] = measured(6, 1e-4, codec)
        for exchange, want in (("auto", ("fp16", "two_stage")), ("gather", ("none", "auto"))):
            for found in run_ranks(lambda ctx, exchange=exchange: ways(ctx, exchange), contexts):
                assert found == ([want[0]], (want[1],))


def test_cost_of_one_slice_in_closed_form() -> None:
    """Encode, to the slice's owner (one way in), add and encode, to all others (one way out), decode."""
    codec, alpha, beta = topk(0.01, 1024), 50e-6, 8e-9
    topology = replace(Topology.virtual(3, 1), inter_node=Link(alpha=alpha, beta=beta))
    plan = two_stage(topology, 1024, compressor=codec)
    assert sum(step.op == "recompress" for step in plan.steps) == 1
    kernel = KernelCost(encode=1e-9, clear=2e-10, decode=1e-10)
    kernels = 1024 * (1e-9 + (2e-10 + 3 * 1e-10 + 1e-9) + (2e-10 + 1e-10))
    want = kernels + 2 * (alpha + 2 * beta * codec.nbytes(1024))
    assert plan.cost(topology, kernels={str(codec): kernel}) == pytest.approx(want)


# -- requests and residual state -----------------------------------------------------------------------------


def test_requests_that_cannot_act_are_refused() -> None:
    for options in ({"exchange": "both"}, {"compressor": None}):
        with pytest.raises(UnsupportedError, match="exchange="):
            two_stage(NAMED["2x2"], 100, **options)
    with pytest.raises(UnsupportedError, match="exchange="):
        two_stage(NAMED["1x4"], 100, compressor=None)
    with engine_contexts(NAMED["2x2"]) as contexts, pytest.raises(UnsupportedError, match="needs compress="):
        by_engine(contexts, gradients(4, 10, seed=1), compress=None, exchange="two_stage")


REGIONS, SLICE = [(0, 4), (8, 12)], [(8, 10)]


def stage(
    residual: Residual, second: list[tuple[int, int]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return residual.stage("x", numel=16, regions={"compress": REGIONS, "recompress": second})


def filled() -> Residual:
    residual = Residual()
    stage(residual, SLICE)[1][:] = np.arange(1, 11)
    residual.commit()
    return residual


def test_both_residuals_are_saved_loaded_rekeyed_and_rolled_back() -> None:
    residual = filled()
    stage(residual, SLICE)[1][:] = 99
    residual.rollback()
    state = residual.state_dict()
    assert {key: values.tolist() for key, values in state.items()} == {
        "x[0:4]": [1, 2, 3, 4],
        "x[8:12]": [5, 6, 7, 8],
        "x[8:10] recompress": [9, 10],
    }
    other = Residual()
    other.load_state_dict(state)
    assert other.unclaimed == ("x",)
    residual.rekey()
    for copy in (residual, other):
        assert stage(copy, SLICE)[0].tolist() == list(range(1, 11))
        assert copy.unclaimed == ()
    broken = {**state, "x[8:11] recompress": np.ones(3, np.float32)}
    other.load_state_dict(state)
    with pytest.raises(ResidualError, match="recompress"):
        other.load_state_dict(broken)


@pytest.mark.parametrize("through", ["calls", "state"])
def test_another_exchange_takes_the_residuals_along(through: str) -> None:
    """To a gather the second residual joins the first: same owner, same units. Back again it starts at zero."""
    residual = filled()
    if through == "state":
        state, residual = residual.state_dict(), Residual()
        residual.load_state_dict(state)
    e_in, e_out = stage(residual, [])
    assert e_in.tolist() == [1, 2, 3, 4, 5 + 9, 6 + 10, 7, 8]
    e_out[:] = e_in
    residual.commit()
    if through == "state":
        state, residual = residual.state_dict(), Residual()
        residual.load_state_dict(state)
    assert stage(residual, SLICE)[0].tolist() == [1, 2, 3, 4, 14, 16, 7, 8, 0, 0]
    with pytest.raises(ResidualError, match="keep one Residual"):
        stage(residual, [])  # within one step there is no other exchange


def test_a_reducer_says_how_many_buckets_go_in_two_stages() -> None:
    from torch import nn

    from hybridcomm.reducer import Reducer

    def table(ctx: object, **options: Any) -> str:
        return str(Reducer(nn.Linear(64, 64), ctx=ctx, compress="topk:0.1/b64", **options).table())  # type: ignore[arg-type]

    for exchange, active in (
        ("auto", "/k6/v10 + dense"),  # the bias
        ("two_stage", "/k6/v10 + dense, 1 of 2 buckets in two stages"),
    ):
        contexts = make_fake_contexts(NAMED["3x1"])
        for text in run_ranks(lambda ctx, exchange=exchange: table(ctx, exchange=exchange), contexts):
            row = text.splitlines()[2]
            assert active in row
            assert ("two_stage" in row) == (exchange == "two_stage")
            assert float(row.split()[-1]) > 1
    (alone,) = make_fake_contexts(NAMED["1x1"])
    for wrong in ({"exchange": "both"}, {"exchange": "gather", "compress": None}):
        with pytest.raises(UnsupportedError, match="exchange="):
            Reducer(nn.Linear(2, 2), ctx=alone, **{"compress": "topk", **wrong})  # type: ignore[arg-type]
