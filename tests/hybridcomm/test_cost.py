"""Predicted times: closed forms of small plans, the bound of the links, and the laws of a cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hybridcomm import collective_plans
from hybridcomm import compress as compressors
from hybridcomm.cost import KernelCost, plan_cost, plan_schedule
from hybridcomm.errors import PlanError
from hybridcomm.plan import OPS, Plan
from hybridcomm.topology import Link, Topology

ALPHA, BETA, NEAR = 50e-6, 8e-9, 0.2e-9
TOPK = compressors.resolve("topk:0.01")
assert TOPK is not None
KERNELS = {str(TOPK): KernelCost(encode=1e-9, clear=0.2e-9, decode=0.1e-9)}


def _measured(topology: Topology, *, alpha: float = ALPHA, beta: float = BETA) -> Topology:
    return replace(
        topology, inter_node=Link(alpha=alpha, beta=beta), intra_node=Link(alpha=alpha / 10, beta=NEAR)
    )


def _allreduce(
    sizes: list[int], numel: int, compressor: object = None, **options: int
) -> tuple[Plan, Topology]:
    topology = _measured(Topology.from_sizes(sizes))
    plan = collective_plans.allreduce(topology, numel, compressor=compressor, **options)  # type: ignore[arg-type]
    return plan, topology


def test_every_op_of_a_plan_has_a_cost() -> None:
    from hybridcomm.cost import _Model

    assert [op for op in OPS if not hasattr(_Model, f"_{op}")] == []


def test_a_broadcast_of_one_chunk_is_alpha_plus_beta_nbytes() -> None:
    topology = _measured(Topology.virtual(2, 1))
    plan = collective_plans.broadcast(topology, 1024, root=0, chunk_elems=1024)
    assert plan.cost(topology) == pytest.approx(ALPHA + BETA * 4096)


def test_a_broadcast_to_three_nodes_shares_the_way_out() -> None:
    topology = _measured(Topology.virtual(4, 1))
    plan = collective_plans.broadcast(topology, 1024, root=0, chunk_elems=1024)
    assert plan.cost(topology) == pytest.approx(ALPHA + 3 * BETA * 4096)


def test_a_long_broadcast_takes_the_way_out_of_its_root_once() -> None:
    topology = _measured(Topology.virtual(4, 2))
    numel = 1 << 20
    plan = collective_plans.broadcast(topology, numel, root=2)
    assert plan.wire_nbytes() == 3 * 4 * numel
    assert 1 < plan.cost(topology) / (BETA * 4 * numel) < 1.3


def test_a_dense_exchange_of_two_nodes_is_one_swap() -> None:
    plan, topology = _allreduce([1, 1], 1024, chunk_elems=1024)
    assert plan.cost(topology) == pytest.approx(ALPHA + BETA * 4096)


def test_a_dense_exchange_of_more_nodes_sends_slices_there_and_back_or_all_of_a_short_one() -> None:
    plan, topology = _allreduce([1, 1, 1], 1 << 14, chunk_elems=1 << 14)
    assert 4 / 3 * BETA * (4 << 14) < plan.cost(topology) - 2 * ALPHA < 2 * BETA * (4 << 14)
    plan, topology = _allreduce([1, 1, 1], 1024, chunk_elems=1024)
    assert plan.cost(topology) == pytest.approx(ALPHA + 2 * BETA * 4096)


def test_inside_a_node_each_byte_makes_a_hop_to_its_owner_and_one_back() -> None:
    plan, topology = _allreduce([2], 1024, chunk_elems=512)
    # each rank puts the other's shard, sums its own, publishes it and gets the other's: 4 x 2 KiB at half of beta
    assert plan.cost(topology) == pytest.approx(4 * NEAR / 2 * 2048 + 2 * ALPHA / 10)


def test_a_compressed_exchange_is_encode_payload_decode() -> None:
    plan, topology = _allreduce([1, 1], 1024, TOPK, chunk_elems=1024)
    assert TOPK is not None
    kernel = 1024 * (1e-9 + 0.2e-9 + 2 * 0.1e-9)
    want = kernel + ALPHA + BETA * TOPK.nbytes(1024)
    assert plan.cost(topology, kernels=KERNELS) == pytest.approx(want)
    slow_start = {text: replace(kernel, call=1e-3) for text, kernel in KERNELS.items()}
    assert plan.cost(topology, kernels=slow_start) == pytest.approx(want + 1e-3)


def test_what_was_not_measured_is_asked_for() -> None:
    plan, topology = _allreduce([1, 1], 1024)
    with pytest.raises(PlanError, match="inter_node was not measured"):
        plan.cost(topology.without_links())
    compressed, _ = _allreduce([1, 1], 1024, TOPK)
    with pytest.raises(PlanError, match=r"no kernel cost for topk.*probe"):
        compressed.cost(topology)
    with pytest.raises(PlanError, match="the ranks stand elsewhere"):
        plan.cost(_measured(Topology.virtual(1, 2)))
    with pytest.raises(PlanError, match="finite"):
        KernelCost(encode=float("inf"), clear=0, decode=0)


_SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)
_NUMEL = st.integers(1, 1 << 20)


def _nic_bound(plan: Plan, beta: float) -> float:
    """The busiest node's bytes in or out: no schedule is faster."""
    assert TOPK is not None
    nodes = len(plan.topology.nodes)
    out, into = [0] * nodes, [0] * nodes
    for step in plan.steps:
        where = [plan.topology.node_of(rank) for rank in step.group]
        if step.op in ("exchange_payload", "exchange_reduce_all"):
            numel = step.region.numel
            each = TOPK.nbytes(numel) if step.op == "exchange_payload" else 4 * numel
            for node in where:
                out[node] += (nodes - 1) * each
        elif step.stream == "exchange":
            root = plan.topology.node_of(step.root)
            for node in where:
                if node != root:
                    source, target = (node, root) if step.op == "exchange_reduce" else (root, node)
                    out[source] += 4 * step.region.numel
                    into[target] += 4 * step.region.numel
    return max(*out, *into) * beta


@given(_SIZES, _NUMEL, st.booleans())
def test_no_plan_is_faster_than_its_links_and_the_answer_is_always_the_same(
    sizes: list[int], numel: int, compressed: bool
) -> None:
    plan, topology = _allreduce(sizes, numel, TOPK if compressed else None)
    seconds = plan_cost(plan, topology, KERNELS)
    assert seconds >= _nic_bound(plan, BETA) * (1 - 1e-9)
    assert seconds == plan_cost(Plan.parse(plan.text), topology, dict(KERNELS))
    schedule = plan_schedule(plan, topology, KERNELS)
    assert min(schedule.start, default=0) >= 0  # every task ran: no stream waits for itself


@given(_SIZES, st.integers(1, 1 << 19), st.booleans())
@example([1, 1, 1, 1], 1600, False)  # at once; twice as many in slices
@example([1, 1, 1, 1], 2720, False)
def test_twice_the_elements_take_longer(sizes: list[int], numel: int, compressed: bool) -> None:
    codec = TOPK if compressed else None
    small, topology = _allreduce(sizes, numel, codec)
    large, _ = _allreduce(sizes, 2 * numel, codec)
    assert plan_cost(large, topology, KERNELS) >= plan_cost(small, topology, KERNELS)


@given(_SIZES, _NUMEL, st.sampled_from([0.25, 0.5, 2, 8]))
def test_cost_is_homogeneous_in_the_figures(sizes: list[int], numel: int, factor: float) -> None:
    plan, topology = _allreduce(sizes, numel)
    scaled = replace(
        topology,
        intra_node=Link(alpha=ALPHA / 10 * factor, beta=NEAR * factor),
        inter_node=Link(alpha=ALPHA * factor, beta=BETA * factor),
    )
    assert plan_cost(plan, scaled) == factor * plan_cost(plan, topology)  # powers of two: nothing is rounded


def test_a_large_dense_plan_comes_close_to_the_wire_limit() -> None:
    plan, topology = _allreduce([2, 2], 1 << 22)
    limit = BETA * 4 * (1 << 22)  # 2 (M - 1) / M * S, M = 2
    assert limit <= plan.cost(topology) < 1.1 * limit
