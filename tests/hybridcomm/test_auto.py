"""``compress="auto"``: decisions follow the figures, name their reason, and are carried out alike by all ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import hybridcomm
from hybridcomm import compress as compressors
from hybridcomm.auto import GAIN, Policy, is_auto, policy_of
from hybridcomm.context import Context
from hybridcomm.cost import KernelCost
from hybridcomm.errors import CompressorError
from hybridcomm.probe import Figures
from hybridcomm.reducer import Reducer
from hybridcomm.topology import Link, Topology
from tests.engine_ranks import each_rank, engine_contexts
from tests.hybridcomm.exact_models import ExactNet
from tests.ranks import run_ranks

TOPK = compressors.resolve("topk:0.01")
assert TOPK is not None
TEXT = str(TOPK)
GIGABIT, FAST = 8e-9, 0.08e-9  # s/byte: 1 and 100 Gbit/s


def _policy(
    *,
    beta: float,
    alpha: float = 50e-6,
    encode: float = 1e-9,
    call: float = 0.0,
    topology: Topology | None = None,
) -> Policy:
    measured = replace(
        topology or Topology.virtual(2, 2),
        intra_node=Link(alpha=5e-6, beta=0.3e-9),
        inter_node=Link(alpha=alpha, beta=beta),
    )
    kernels = {TEXT: KernelCost(encode=encode, clear=0.1e-9, decode=0.1e-9, call=call)}
    assert TOPK is not None
    return Policy(figures=Figures(topology=measured, kernels=kernels), candidates=(TOPK,))


def test_a_slow_link_compresses_large_tensors_and_a_fast_one_nothing() -> None:
    assert _policy(beta=GIGABIT).decide(1 << 22).active == TEXT
    decision = _policy(beta=FAST).decide(1 << 22)
    assert decision.active == "none"
    assert "below" in decision.reason
    assert decision.seconds[TEXT] > GAIN * decision.seconds["none"]


def test_a_slow_kernel_makes_dense_the_answer() -> None:
    assert _policy(beta=GIGABIT, encode=100e-9).decide(1 << 22).active == "none"


def test_the_gain_decides_to_either_side_of_the_line() -> None:
    answers = {}
    for exponent in range(60):  # from 100 Gbit/s to a tenth of a Gbit/s
        found = _policy(beta=FAST * 1.125**exponent).decide(1 << 20)
        pays = found.seconds[TEXT] < GAIN * found.seconds["none"]
        assert (found.active != "none") == pays
        answers.setdefault(pays, exponent)
    assert answers[False] == 0
    assert answers[True] > 0


@pytest.mark.parametrize(
    ("topology", "numel", "dtype", "op", "why"),
    [
        (Topology.virtual(1, 4), 1 << 20, "float32", "sum", "one node"),
        (None, 1 << 20, "bfloat16", "sum", "only float32"),
        (None, 1 << 20, "float32", "max", "only sum and mean"),
        (None, 0, "float32", "sum", "no elements"),
    ],
)
def test_where_compression_cannot_act_the_answer_is_dense_with_the_reason(
    topology: Topology | None, numel: int, dtype: str, op: str, why: str
) -> None:
    found = _policy(beta=GIGABIT, topology=topology).decide(numel, dtype=dtype, op=op)
    assert (found.active, found.seconds) == ("none", {})
    assert why in found.reason
    assert why in str(found)


def test_of_several_candidates_the_fastest_is_taken() -> None:
    policy = _policy(beta=GIGABIT)
    other = compressors.resolve("topk:0.1")
    assert other is not None
    kernels = {**policy.figures.kernels, str(other): KernelCost(encode=1e-9, clear=0.1e-9, decode=0.1e-9)}
    both = replace(
        policy,
        figures=replace(policy.figures, kernels=kernels),
        candidates=(other, *policy.candidates),
    )
    found = both.decide(1 << 22)
    assert found.active == TEXT
    assert set(found.seconds) == {"none", TEXT, str(other)}


def test_beyond_the_largest_size_decisions_are_in_proportion() -> None:
    policy = _policy(beta=GIGABIT)
    at, beyond = (policy.decide(numel).seconds["none"] for numel in (1 << 24, 1 << 26))
    assert beyond == pytest.approx(4 * at)


def test_the_table_says_what_is_requested_and_active_with_times_and_reason() -> None:
    head, near, small, large = _policy(beta=GIGABIT, call=100e-6).table([256, 1 << 24]).splitlines()
    assert [word for word in head.split("  ") if word][:4] == ["link", "size (B)", "requested", "active"]
    assert near.startswith("intra_node  any")
    assert "compression acts between nodes" in near
    assert small.split()[:4] == ["inter_node", "256", "auto", "dense"]
    assert large.split()[:4] == ["inter_node", str(1 << 24), "auto", TEXT]
    assert "times as fast as dense" in large


@pytest.mark.parametrize(("beta", "compressed"), [(100 * GIGABIT, True), (0.0, False)])
def test_all_ranks_do_what_the_policy_says(beta: float, compressed: bool) -> None:
    topology, numel = Topology.virtual(2, 1), 1 << 14
    with engine_contexts(topology) as contexts:

        def body(rank: int) -> tuple[np.ndarray, int, str]:
            context: Context = contexts[rank]
            context.policies["auto"] = _policy(beta=beta, alpha=0.0, topology=topology)
            t = np.arange(numel, dtype=np.float32) % 7 + rank
            residual = hybridcomm.Residual()
            context.allreduce(t, compress="auto", residual=residual)
            residual.commit()
            plan = context.plan_allreduce(numel, compress="auto")
            return t, context.counters()["wire_tx_bytes"], plan.compressor

        results = each_rank(body, 2)
    for result in results:
        assert not isinstance(result, BaseException), result
        t, sent, active = result
        assert active == (TEXT if compressed else "none")
        exact = 2 * (np.arange(numel, dtype=np.float32) % 7) + 1
        assert np.array_equal(t, exact) != compressed
        assert (sent < 4 * numel // 8) == compressed
    assert np.array_equal(results[0][0], results[1][0])


def test_the_first_call_probes_and_all_ranks_agree() -> None:
    topology = Topology.virtual(2, 1)
    with engine_contexts(topology) as contexts:

        def body(rank: int) -> Policy:
            t = np.ones(256, np.float32)
            contexts[rank].allreduce(t, compress="auto:topk:0.1")
            found = policy_of(contexts[rank], "auto:topk:0.1")
            assert found is policy_of(contexts[rank], "auto:topk:0.1")
            return found

        one, two = each_rank(body, 2)
    assert isinstance(one, Policy), one
    assert one == two
    assert one.figures.topology.inter_node.beta is not None
    assert list(one.figures.kernels) == [str(compressors.resolve("topk:0.1"))]


def test_texts_that_name_no_codec_are_refused() -> None:
    assert [is_auto(text) for text in ("auto", "auto:int8", "topk:0.01", None)] == [True, True, False, False]
    with engine_contexts(Topology.virtual(1, 1)) as (context,):
        for text in ("auto:none", "auto:", "auto:wavelets"):
            with pytest.raises(CompressorError):
                context.allreduce(np.ones(4, np.float32), compress=text)


def test_a_reducer_decides_per_bucket_when_it_is_built() -> None:
    def rank(context: Context) -> tuple[list[str], str]:
        model = ExactNet()
        reducer = Reducer(model, ctx=context, compress="auto:topk:0.1/b64")
        model.loss(context.rank, 0).backward()
        reducer.finalize()
        reducer.commit()
        active = [str(schedule) for schedule in reducer.schedules]
        return active, reducer.table()

    with engine_contexts(Topology.virtual(2, 1)) as contexts:
        results = run_ranks(rank, contexts)
    assert results[0] == results[1]
    active, table = results[0]
    assert set(active) <= {"none", "topk:0.1/b64/k6/v10"}
    assert "inter_node  auto:topk:0.1/b64" in table
