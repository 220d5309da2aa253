"""Stages in nodes beside those between them, on streams of their own, where NCCL keeps the order of the calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from hybridcomm import device_comms, lower_device
from hybridcomm.device_context import DeviceContext
from hybridcomm.device_plan import Operation
from hybridcomm.errors import UnsupportedError
from hybridcomm.selftest.reductions import dense, feedback
from hybridcomm.topology import Topology
from tests.gpu.device_ranks import NCCL, Rank, gradient, run_devices
from tests.gpu.device_training import compared
from tests.gpu.test_device_mesh import MESHES
from tests.gpu.test_device_pipeline import CONFIG

pytestmark = pytest.mark.xdist_group("gpu-engine")

ORDERS = 22602
"""The first NCCL that keeps the order of calls."""
NODES = Topology.virtual(2, 2)


@pytest.fixture
def implicit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "1")


@pytest.mark.parametrize(
    ("nccl", "order", "beside"),
    [
        (ORDERS, "1", True),
        (ORDERS, "0", False),
        (ORDERS, None, False),
        (22505, "1", False),
        (NCCL, "1", False),
    ],
)
def test_a_second_stream_needs_an_nccl_that_keeps_the_order(
    nccl: int, order: str | None, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCCL_LAUNCH_ORDER_IMPLICIT", raising=False)
    if order is not None:
        monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", order)
    results, reports = run_devices(Topology.virtual(2, 1), lambda rank: rank.device.describe(), nccl=nccl)
    assert all(("in nodes run beside those between them" in text) == beside for text in results)
    assert reports == []


def test_ranks_that_were_started_differently_are_refused(
    implicit: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = itertools.count()
    monkeypatch.setattr(device_comms, "keeps_order", lambda engine: next(count) == 0)

    def body(rank: Rank) -> None:
        with pytest.raises(UnsupportedError, match="start all with the same NCCL_LAUNCH_ORDER_IMPLICIT"):
            DeviceContext.connect(rank.host, rank.torch, watch=0)

    run_devices(NODES, body, nccl=ORDERS, connect=False)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("codec", "exchange"), [("topk:0.01", "gather"), ("int8", "gather"), ("int8", "two_stage")]
)
def test_the_hosts_bits_under_many_orders(codec: str, exchange: str, seed: int, implicit: None) -> None:
    body = feedback(codec, exchange, 1 << 15)
    results, reports = run_devices(NODES, body, nccl=ORDERS, seed=seed)
    assert results == [[]] * 4
    assert reports == []


@pytest.mark.parametrize("eager", [0, 60, 97])
@pytest.mark.parametrize("nodes", [(2, 2), (2, 1)])
def test_dense_sums_stage_by_stage(nodes: tuple[int, ...], eager: int, implicit: None) -> None:
    topology = Topology.from_sizes(nodes)
    body = dense(torch.float32, flat=False, numel=4096 + 16)
    results, reports = run_devices(topology, body, nccl=ORDERS, seed=7, eager_percent=eager, flat=False)
    assert results == [[]] * topology.world_size
    assert reports == []


def buckets(rank: Rank) -> bool:
    """Three under way at once, two of one size, waited for out of order."""
    sizes, call = (1 << 15, 1 << 14, 1 << 15), {"op": "mean", "compress": "int8"}
    want = [gradient(numel, rank.rank, number) for number, numel in enumerate(sizes)]
    tensors = [rank.upload(each) for each in want]
    works = [rank.device.allreduce(tensor, **call, async_op=True) for tensor in tensors]
    for number in (1, 0, 2):
        works[number].wait()
    for each in want:
        rank.host.allreduce(each, **call)
    return all(torch.equal(rank.download(tensor), each) for tensor, each in zip(tensors, want, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_buckets_under_way_together(seed: int, implicit: None) -> None:
    results, reports = run_devices(NODES, buckets, nccl=ORDERS, seed=seed)
    assert results == [True] * 4
    assert reports == []


@pytest.mark.parametrize("mesh", ["pp and tp", "pp and zero"])
def test_trainings_give_the_cpus_bits(mesh: str, implicit: None) -> None:
    """Layers' and buckets' calls on one stream beside messages on the other: launched in one order, none of them waits
    for ever."""
    config = CONFIG.model_copy(update={"microbatches": 2, **MESHES[mesh]})
    results, reports = compared(config, NODES, steps=4, seed=6, nccl=ORDERS)
    assert results == [[]] * 4
    assert reports == []


def _without_waits(stream: str) -> Callable[[Sequence[Operation]], list[tuple[int, ...]]]:
    right = lower_device.pruned

    def pruned(operations: Sequence[Operation]) -> list[tuple[int, ...]]:
        """Operations of a stream wait for the caller alone."""
        alone = [replace(op, after=(-1,)) if op.stream == stream else op for op in operations]
        return right(alone)

    return pruned


@pytest.mark.parametrize("stream", ["intra", "inter"])
def test_control_stages_that_do_not_wait_for_each_other_are_noticed(
    stream: str, implicit: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one stream that would do, but for kernels: it is the second that needs the events."""
    monkeypatch.setattr(lower_device, "pruned", _without_waits(stream))
    body = dense(torch.float32, flat=False, numel=4096 + 16)
    _, reports = run_devices(NODES, body, nccl=ORDERS, seed=7, flat=False)
    assert any("race" in report for report in reports)
    monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "0")
    results, reports = run_devices(NODES, body, nccl=ORDERS, seed=7, flat=False)
    assert results == [[]] * 4
    assert reports == []
