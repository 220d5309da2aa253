"""``compress="auto"`` on simulated GPUs: figures come from a clock that the test gives, and decide both ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from hybridcomm import Reducer, auto, device_probe
from hybridcomm import compress as compressors
from hybridcomm.cost import KernelCost
from hybridcomm.device_auto import DevicePolicy
from hybridcomm.device_probe import DeviceFigures, fit_line
from hybridcomm.errors import UnsupportedError
from hybridcomm.residual import Residual
from hybridcomm.selftest.kernels import SPECS
from hybridcomm.selftest.rank import numbers, total
from hybridcomm.topology import Link, Topology
from tests.gpu.device_ranks import Rank, gradient, run_devices
from tests.gpu.test_device_reducer import on_device

pytestmark = pytest.mark.xdist_group("gpu-engine")

NUMEL = 1 << 14
SLOW, FAST = 1e6, 1e12  # bytes/s between nodes
NVLINK, LAUNCH = 1e11, 3e-6
TOPK = compressors.resolve("topk:0.01")
assert TOPK is not None
TEXT = str(TOPK)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated device takes its time for megabytes."""
    monkeypatch.setattr(device_probe, "SIZES", (1 << 12, 1 << 14, 3 << 14))
    monkeypatch.setattr(device_probe, "KERNEL_SIZES", (1 << 14, 1 << 15))
    monkeypatch.setattr(device_probe, "_ROUNDS", 1)
    monkeypatch.setattr(device_probe, "_ENOUGH", 1e9)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """s that devices would take: ``wire`` bytes/s between nodes; to encode, clear and decode, s per element."""

    rank: Rank
    wire: float
    kernels: tuple[float, float, float] = (2e-11, 1e-11, 3e-12)

    def __call__(self, call: Callable[[], object], what: str, size: int) -> float:
        self.rank.torch.timed(call)  # it is put on the device all the same
        encode, clear, decode = self.kernels
        nodes, ranks = len(self.rank.host.topology.nodes), self.rank.host.topology.K
        if what == "all_reduce":
            return 20e-6 + 2 * size / self.wire
        if what == "node":
            return 2 * (5e-6 + (ranks - 1) / ranks * size / NVLINK)
        if what == "between":
            return 15e-6 + (nodes - 1) / nodes * size / self.wire
        if "decode" in what:
            return LAUNCH + size * (clear + decode * int(what.rpartition(" ")[2]))
        return LAUNCH + size * encode


def timed(rank: Rank, wire: float, **options: Any) -> None:
    rank.device.stopwatch = Clock(rank=rank, wire=wire, **options)


@pytest.mark.parametrize(("wire", "compressed"), [(SLOW, True), (FAST, False)])
def test_slow_links_compress_and_fast_ones_are_left_to_nccl(wire: float, compressed: bool) -> None:
    def body(rank: Rank) -> list[Any]:
        timed(rank, wire)
        on_host, on_device = Residual(), Residual()
        want, dense = gradient(NUMEL, rank.rank, 0), numbers(NUMEL, rank.rank)
        tensor, exact = rank.upload(want), rank.upload(dense)
        rank.host.allreduce(want, compress="topk:0.01", residual=on_host)
        rank.device.allreduce(tensor, compress="auto", residual=on_device)
        rank.device.allreduce(exact, compress="auto", residual=Residual())
        policy = auto.policy_of(rank.device)
        decision = policy.decide(NUMEL)
        is_exact = torch.equal(rank.download(exact), total(rank, NUMEL))
        assert f"inter_node  {4 * NUMEL}" in policy.table([4 * NUMEL])
        assert "flat, by NCCL" in policy.table([4 * NUMEL])
        return [decision.active, torch.equal(rank.download(tensor), want), is_exact, decision.reason]

    results, reports = run_devices(Topology.virtual(2, 2), body)
    assert reports == []
    for active, hosts_bits, is_exact, reason in results:
        assert (active, hosts_bits, is_exact) == (TEXT if compressed else "none", compressed, not compressed)
        assert ("times as fast as dense" in reason) == compressed


def test_figures_are_those_of_the_clock() -> None:
    def body(rank: Rank) -> DeviceFigures:
        timed(rank, SLOW)
        found = auto.policy_of(rank.device).figures
        assert isinstance(found, DeviceFigures)
        return found

    results, _ = run_devices(Topology.virtual(2, 2), body)
    for found in results:
        near, far, kernel = found.topology.intra_node, found.topology.inter_node, found.kernels[TEXT]
        assert (near.alpha, near.beta) == (pytest.approx(5e-6), pytest.approx(1 / NVLINK))
        assert (far.alpha, far.beta) == (pytest.approx(15e-6), pytest.approx(1 / SLOW))
        assert (found.flat.alpha, found.flat.beta) == (
            pytest.approx(20e-6, rel=1e-3),
            pytest.approx(2 / SLOW),
        )
        assert [kernel.encode, kernel.clear, kernel.decode, kernel.call] == [
            pytest.approx(value) for value in (2e-11, 1e-11, 3e-12, 2 * LAUNCH)
        ]


def figures_by_rank() -> list[DeviceFigures]:
    def body(rank: Rank) -> Any:
        timed(rank, SLOW if rank.rank else FAST, kernels=(1e-11 * (1 + rank.rank), 1e-11, 3e-12))
        return auto.policy_of(rank.device).figures

    return run_devices(Topology.virtual(2, 1), body)[0]


def test_ranks_whose_clocks_differ_decide_alike() -> None:
    first, second = figures_by_rank()
    assert first == second
    assert first.kernels[TEXT].encode == pytest.approx(1e-11)  # rank 0's


def test_ranks_that_keep_their_own_figures_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test before."""
    monkeypatch.setattr(device_probe._Probe, "_agreed", lambda _, values: list(values))
    first, second = figures_by_rank()
    assert first != second


@pytest.mark.parametrize("nodes", [(2, 1), (1, 1, 2)])
def test_nodes_of_unequal_size_are_measured(nodes: tuple[int, ...]) -> None:
    def body(rank: Rank) -> str:
        timed(rank, SLOW)
        return auto.policy_of(rank.device).decide(NUMEL).active

    results, reports = run_devices(Topology.from_sizes(nodes), body, seed=4)
    assert results == [TEXT] * sum(nodes)
    assert reports == []


def test_every_codec_can_be_measured() -> None:
    """Its kernels run on payloads that they made, of which the simulation checks every access."""
    codecs = ",".join(SPECS)

    def body(rank: Rank) -> int:
        timed(rank, SLOW)
        return len(auto.policy_of(rank.device, f"auto:{codecs}").decide(NUMEL).seconds)

    results, reports = run_devices(Topology.virtual(2, 1), body)
    assert results == [len(SPECS) + 1] * 2
    assert reports == []


def test_what_cannot_be_compressed_is_dense_with_the_reason() -> None:
    def body(rank: Rank) -> None:
        timed(rank, SLOW)
        policy = auto.policy_of(rank.device)
        assert "multiples of 16" in policy.decide(4099).reason
        assert "only float32" in policy.decide(NUMEL, dtype="bfloat16").reason
        odd = rank.upload(numbers(4099, rank.rank))
        rank.device.allreduce(odd, compress="auto")
        assert torch.equal(rank.download(odd), total(rank, 4099))
        with pytest.raises(UnsupportedError, match="kernel"):
            rank.device.allreduce(odd, compress="auto:topk:0.03")
        with rank.torch.capture() as graphs, pytest.raises(UnsupportedError, match="before the capture"):
            rank.device.allreduce(odd, compress="auto:int8")
        rank.torch.forget(graphs[0])

    results, reports = run_devices(Topology.virtual(2, 1), body)
    assert results == [None] * 2
    assert reports == []


def test_the_reducer_decides_by_bucket_and_its_table_says_so() -> None:
    def body(rank: Rank) -> str:
        timed(rank, SLOW)
        module = nn.Linear(128, 64)
        on_device(rank, module)
        reducer = Reducer(module, ctx=rank.host, compress="auto")
        said = reducer.table()
        reducer.close()
        rank.torch.synchronize()
        for parameter in module.parameters():
            rank.torch.drop(parameter.data)
            assert parameter.grad is not None
            rank.torch.drop(parameter.grad)
        return said

    results, reports = run_devices(Topology.virtual(2, 1), body)
    assert all("auto" in said and TEXT in said for said in results), results[0]
    assert reports == []


# -- the policy alone --------------------------------------------------------------------------------------


def policy(nodes: int, wire: float, encode: float = 1e-11) -> DevicePolicy:
    topology = replace(
        Topology.virtual(nodes, 8),
        intra_node=Link(alpha=30e-6, beta=1 / NVLINK),
        inter_node=Link(alpha=20e-6, beta=8 / wire),
    )
    kernels = {TEXT: KernelCost(encode=encode, clear=1e-11, decode=1e-12, call=1e-5)}
    flat = Link(alpha=50e-6, beta=2 / wire)
    assert TOPK is not None
    return DevicePolicy(
        figures=DeviceFigures(topology=topology, kernels=kernels, flat=flat), candidates=(TOPK,)
    )


def test_there_is_a_crossover_in_size_and_one_in_speed() -> None:
    slow = policy(8, 1.25e9)
    assert [slow.decide(1 << size).active for size in (12, 24)] == ["none", TEXT]
    answers = [policy(8, 1.25e9 * 4**step).decide(1 << 24).active for step in range(10)]
    assert answers[0] == TEXT
    assert answers[-1] == "none"
    assert answers == sorted(answers, key=lambda active: active == "none")
    assert policy(8, 1.25e9, encode=1e-7).decide(1 << 24).active == "none"


def test_many_nodes_on_a_slow_link_exchange_in_two_stages() -> None:
    assert policy(4, 1e8).decide(1 << 26).exchange == "gather"
    assert policy(64, 1e8).decide(1 << 26).exchange == "two_stage"


def test_a_disturbed_time_moves_no_line() -> None:
    sizes = (1, 10, 20, 40, 80)
    found = fit_line(sizes, [5e-6 + 1e-6 * size + (50e-6 if size == 20 else 0) for size in sizes])
    assert found.beta == pytest.approx(1e-6, rel=0.3)
    assert found.alpha == pytest.approx(5e-6, rel=0.3)
