"""All-reduces on simulated GPUs: the host backend's bits, and nothing that the simulated driver could report."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridcomm import device_decay, device_draws
from hybridcomm.errors import DataTypeError, UnsupportedError
from hybridcomm.residual import Residual
from hybridcomm.selftest.cases import SEEDED, TWICE
from hybridcomm.selftest.kernels import SPECS
from hybridcomm.selftest.reductions import dense, draws, feedback, reals
from hybridcomm.topology import Topology
from tests.gpu.device_ranks import Rank, gradient, run_devices

pytestmark = pytest.mark.xdist_group("gpu-engine")


@pytest.mark.parametrize("codec", SPECS)
@pytest.mark.parametrize(("nodes", "seed"), [("2x2", 1), ("3x1", 2)])
def test_payloads_gathered_give_the_hosts_bits(codec: str, nodes: str, seed: int) -> None:
    topology = Topology.virtual(*map(int, nodes.split("x")))
    results, reports = run_devices(topology, feedback(codec, "gather", 1 << 16), seed=seed)
    assert results == [[]] * topology.world_size
    assert reports == []


@pytest.mark.parametrize("codec", TWICE)
def test_payloads_in_two_stages_give_the_hosts_bits(codec: str) -> None:
    results, reports = run_devices(Topology.virtual(3, 2), feedback(codec, "two_stage", 3 << 16), seed=3)
    assert results == [[]] * 6
    assert reports == []


@pytest.mark.parametrize("codec", SPECS)
def test_a_decayed_residual_gives_the_hosts_bits(codec: str) -> None:
    """Also where a step that is not finite leaves the residual as it was, undecayed."""
    body = feedback(codec, "gather", 1 << 14, 4, decay=0.9, spoilt=2)
    results, reports = run_devices(Topology.virtual(2, 1), body, seed=4)
    assert results == [[]] * 2
    assert reports == []


@pytest.mark.parametrize("codec", ["topk:0.01", "int8", "powersgd:2"])
def test_a_decayed_second_residual_gives_the_hosts_bits(codec: str) -> None:
    body = feedback(codec, "two_stage", 3 << 14, 4, decay=0.7, spoilt=2)
    results, reports = run_devices(Topology.virtual(3, 1), body, seed=5)
    assert results == [[]] * 3
    assert reports == []


@pytest.mark.parametrize(
    ("codec", "name", "bug"),
    [
        ("int8", "_restores", lambda _: False),
        ("int8", "Decay.record", lambda self, record, e_in: record(e_in, 1.0)),
        ("topk:0.01", "Decay.record", lambda self, record, e_in: record(e_in, 1.0)),
    ],
)
def test_a_decay_that_is_forgotten_or_kept_too_long_is_noticed(
    codec: str, name: str, bug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, _, method = name.rpartition(".")
    monkeypatch.setattr(getattr(device_decay, owner) if owner else device_decay, method, bug)
    results, _ = run_devices(
        Topology.virtual(2, 1), feedback(codec, "gather", 1 << 14, 4, decay=0.9, spoilt=2)
    )
    assert all(results)


@pytest.mark.parametrize("codec", SEEDED)
def test_every_call_draws_anew_and_as_the_host_does(codec: str) -> None:
    """Several chunks, each a step with a seed of its own."""
    results, reports = run_devices(Topology.virtual(2, 1), draws(codec, 5 << 17), seed=6)
    assert results == [[]] * 2
    assert reports == []


@pytest.mark.parametrize(("call", "step"), [(0, 1), (1, 0)])
def test_a_seed_that_forgets_the_call_or_the_step_is_noticed(
    call: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = device_draws.seed_of
    monkeypatch.setattr(device_draws, "seed_of", lambda digest, c, s: right(digest, c * call, s * step))
    results, _ = run_devices(Topology.virtual(2, 1), feedback("powersgd:2", "gather", 1 << 14))
    assert all(results)


def test_draws_do_not_depend_on_the_stream_and_are_in_no_graph() -> None:
    def body(rank: Rank) -> bool:
        grad = gradient(1 << 14, rank.rank, 0)
        want, tensor = grad.clone(), rank.upload(grad)
        first, into, again = rank.torch.stream(), rank.upload(grad), grad.clone()
        rank.host.allreduce(want, compress="powersgd:2")
        with rank.torch.other_stream():
            rank.device.allreduce(tensor, compress="powersgd:2", stream=first)
        rank.host.allreduce(again, compress="powersgd:2")
        rank.device.allreduce(into, compress="powersgd:2")
        same = torch.equal(rank.download(tensor), want) and torch.equal(rank.download(into), again)
        with (
            rank.torch.capture() as graphs,
            pytest.raises(UnsupportedError, match="draws anew in every call"),
        ):
            rank.device.allreduce(into, compress="powersgd:2")
        rank.torch.forget(graphs[0])
        rank.host.allreduce(again, compress="powersgd:2")
        rank.device.allreduce(into, compress="powersgd:2")
        return same and torch.equal(rank.download(into), again)

    results, reports = run_devices(Topology.virtual(2, 1), body, seed=8)
    assert results == [True] * 2
    assert reports == []


def test_nodes_of_unequal_size_give_the_hosts_bits() -> None:
    topology = Topology.from_sizes((3, 1, 2))
    results, reports = run_devices(topology, feedback("topk:0.01", "gather", 3 * 4096 * 4), seed=5)
    assert results == [[]] * 6
    assert reports == []


@pytest.mark.parametrize("exchange", ["gather", "two_stage"])
@pytest.mark.parametrize("codec", ["topk:0.01", "randk:0.01"])
def test_ranks_that_own_nothing_of_a_short_tensor_take_part(codec: str, exchange: str) -> None:
    """One block, so one shard, of which rank 1 has none: there is nothing that it could encode, with or without a
    residual."""
    call = {"op": "sum", "compress": codec, "exchange": exchange}

    def body(rank: Rank) -> list[bool]:
        same = []
        for residual in ({}, {"residual": Residual()}):
            want = gradient(1024, rank.rank, 0)
            tensor = rank.upload(want)
            rank.host.allreduce(want, **call, **({"residual": Residual()} if residual else {}))
            rank.device.allreduce(tensor, **call, **residual)
            same.append(torch.equal(rank.download(tensor), want))
        return same

    results, reports = run_devices(Topology.from_sizes((2, 1)), body)
    assert results == [[True, True]] * 3
    assert reports == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("nodes", [(4,), (2, 2), (1, 1, 1, 1)])
def test_dense_sums_and_means_are_right(dtype: torch.dtype, flat: bool, nodes: tuple[int, ...]) -> None:
    """Integers of crafted sizes: sums are exact in any order, and a mean of four halves them exactly."""
    body = dense(dtype, flat=flat, numel=4096 + 16)
    results, reports = run_devices(Topology.from_sizes(nodes), body, seed=7)
    assert results == [[]] * 4
    assert reports == []


@pytest.mark.parametrize("flat", [True, False])
def test_dense_sums_of_real_numbers_are_within_their_roundings(flat: bool) -> None:
    """Of three ranks, where means round as well."""
    topology = Topology.from_sizes((2, 1))
    for body in (reals(flat=flat, numel=4099), dense(torch.float32, flat=flat, numel=4099)):
        results, reports = run_devices(topology, body, seed=8)
        assert results == [[]] * 3
        assert reports == []


@pytest.mark.parametrize("eager", [0, 60, 97])
def test_buckets_under_way_together_are_right_under_many_orders(eager: int) -> None:
    """Heads and tails of several buckets interleave; three buckets, two of one size, waited for out of order."""
    sizes = (1 << 14, 1 << 14, 1 << 13)

    def body(rank: Rank) -> list[bool]:
        residual, want, tensors, works = Residual(), [], [], []
        for index, numel in enumerate(sizes):
            grad = gradient(numel, rank.rank, index)
            want.append(grad.clone())
            rank.host.allreduce(want[-1], op="mean", compress="topk:0.01")
            tensors.append(rank.upload(grad))
        for index, tensor in enumerate(tensors):
            works.append(
                rank.device.allreduce(
                    tensor,
                    op="mean",
                    compress="topk:0.01",
                    residual=residual,
                    residual_key=f"{index}",
                    async_op=True,
                )
            )
        for work in reversed(works):
            work.wait()
        return [torch.equal(rank.download(t), w) for t, w in zip(tensors, want, strict=True)]

    for seed in range(8):
        results, reports = run_devices(Topology.virtual(2, 2), body, seed=seed, eager_percent=eager)
        assert results == [[True] * 3] * 4, seed
        assert reports == [], seed


def test_the_host_may_read_once_it_has_waited_and_no_earlier() -> None:
    """The negative control of the simulation's own check: who reads too early is told."""

    def body(rank: Rank, early: bool) -> None:
        tensor = rank.torch.adopt(gradient(4096, rank.rank, 0))
        work = rank.device.allreduce(tensor, async_op=True)
        if not early:
            work.synchronize()
        rank.torch.reads(tensor)
        work.synchronize()
        rank.torch.drop(tensor)

    _, reports = run_devices(Topology.virtual(2, 1), lambda rank: body(rank, early=False))
    assert reports == []
    _, reports = run_devices(Topology.virtual(2, 1), lambda rank: body(rank, early=True))
    assert any("host" in line for line in reports)


def test_what_a_gpu_cannot_do_is_refused_with_advice() -> None:
    def body(rank: Rank) -> None:
        device, tensor = rank.device, rank.upload(torch.ones(1 << 14))
        with pytest.raises(UnsupportedError, match="no kernels for GPUs"):
            device.allreduce(tensor, compress="powersgd:8")
        with pytest.raises(UnsupportedError, match="kernel"):
            device.allreduce(tensor, compress="topk:0.03")
        with pytest.raises(UnsupportedError, match="16"):
            device.allreduce(rank.upload(torch.ones(4099)), compress="topk:0.01")
        with pytest.raises(UnsupportedError, match="momentum"):
            device.allreduce(tensor, compress="topk:0.01", residual=Residual(momentum=0.9))
        with pytest.raises(UnsupportedError, match="residual"):
            device.allreduce(tensor, residual=Residual())
        with pytest.raises(DataTypeError, match="NCCL"):
            device.allreduce(rank.upload(torch.ones(16, dtype=torch.int16)))
        with pytest.raises(DataTypeError, match="contiguous"):
            device.allreduce(rank.upload(torch.ones(64)).view(8, 8).t())

    results, reports = run_devices(Topology.virtual(2, 1), body)
    assert results == [None, None]
    assert reports == []


def test_ranks_that_mix_up_buckets_are_told_in_debug_mode() -> None:
    """Two buckets of one size, swapped on one rank: NCCL would sum them, each into the other."""

    def body(rank: Rank) -> str:
        names = ("first", "second") if rank.rank else ("second", "first")
        try:
            for name in names:
                tensor = rank.upload(torch.ones(256))
                rank.device.allreduce(tensor, residual_key=name)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    results, _ = run_devices(Topology.virtual(2, 1), body, debug=True)
    assert all(result.startswith("PlanMismatchError") and "call 1" in result for result in results)
