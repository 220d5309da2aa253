"""The module's verbs and `hybridcomm.init` with tensors on GPUs: who connects them, takes a call, and refuses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hybridcomm
from hybridcomm import device_context, placing
from hybridcomm.errors import DataTypeError, HybridCommError, PlanMismatchError, UnsupportedError
from hybridcomm.point_to_point import P2POp
from hybridcomm.selftest.rank import numbers
from hybridcomm.topology import Topology
from tests.gpu.device_ranks import Rank, gradient, run_devices
from tests.gpu.simulated import Simulation
from tests.gpu.simulated_torch import SimulatedTorch
from tests.gpu.simulation import library
from tests.gpu.test_device_reducer import on_device

pytestmark = pytest.mark.xdist_group("gpu-engine")

TWO = Topology.virtual(2, 1)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """What a rank's test puts into ``found.provider`` is the GPU that torch has, and says which tensors lie there."""
    here = threading.local()

    def torch_cuda(device: Any = None) -> SimulatedTorch:
        if not hasattr(here, "provider"):
            raise UnsupportedError("torch sees no GPU")
        provider: SimulatedTorch = here.provider
        return provider

    def on_gpu(array: Any) -> bool:
        return hasattr(here, "provider") and here.provider.owns(array)

    monkeypatch.setattr(device_context, "TorchCuda", torch_cuda)
    monkeypatch.setattr(placing, "on_gpu", on_gpu)
    return here


def unconnected(
    found: threading.local, body: Callable[[Rank], Any], topology: Topology = TWO, **options: Any
) -> list[Any]:
    def ranked(rank: Rank) -> Any:
        found.provider = rank.torch
        return body(rank)

    results, reports = run_devices(topology, ranked, connect=False, **options)
    assert reports == []
    return results


def test_the_first_collective_of_all_ranks_connects_their_gpus(found: threading.local) -> None:
    def body(rank: Rank) -> list[bool]:
        assert rank.host.device is None
        grad = gradient(1 << 13, rank.rank, 0)
        want, tensor = grad.clone(), rank.upload(grad)
        rank.host.allreduce(want, compress="topk:0.01")
        hybridcomm.allreduce(tensor, compress="topk:0.01", group=rank.host)
        device = rank.host.device
        hybridcomm.allreduce(tensor.clone(), group=rank.host)  # of the host: not the device's call
        return [device is not None and device._calls == 1, torch.equal(rank.download(tensor), want)]

    assert unconnected(found, body) == [[True, True]] * 2


def test_a_rank_with_a_tensor_of_its_host_makes_connecting_a_mismatch(found: threading.local) -> None:
    """Not a hang: the calls that meet on the host differ, and say so on both ranks."""

    def body(rank: Rank) -> tuple[str, bool]:
        tensor = torch.ones(64) if rank.rank else rank.upload(torch.ones(64))
        begin = time.monotonic()
        try:
            hybridcomm.allreduce(tensor, group=rank.host)
        except HybridCommError as error:
            return type(error).__name__, time.monotonic() - begin < 10
        return "nothing", False

    assert unconnected(found, body, stall_s=30.0) == [("PlanMismatchError", True)] * 2


def test_a_rank_without_a_gpu_is_named_on_all_ranks(found: threading.local) -> None:
    def body(rank: Rank) -> str:
        if rank.rank == 1:
            del found.provider
        try:
            rank.host.connect_device()
        except UnsupportedError as error:
            return str(error)
        return "nothing"

    results = unconnected(found, body, stall_s=30.0)
    assert all("rank 1 has no GPU (torch sees no GPU" in said for said in results), results


def test_messages_groups_and_blocks_do_not_connect_and_say_what_does(found: threading.local) -> None:
    def body(rank: Rank) -> None:
        tensor, other = rank.upload(torch.ones(8)), 1 - rank.rank
        advice = r"hybridcomm.init\(device='cuda'\)"
        for call in (
            lambda: hybridcomm.send(tensor, other, group=rank.host),
            lambda: hybridcomm.irecv(tensor, other, group=rank.host),
            lambda: hybridcomm.allreduce(tensor, group=rank.host.group([rank.rank])),
            lambda: hybridcomm.empty(8, device="cuda", group=rank.host),
        ):
            with pytest.raises(DataTypeError, match=advice):
                call()
        with pytest.raises(DataTypeError, match=advice), hybridcomm.coalescing(rank.host):
            hybridcomm.allreduce(tensor, group=rank.host)

    assert unconnected(found, body) == [None] * 2


def test_what_verbs_cannot_do_on_gpus_is_refused_with_the_reason() -> None:
    def body(rank: Rank) -> None:
        host, tensor, other = rank.host, rank.upload(torch.ones(8)), 1 - rank.rank
        with pytest.raises(UnsupportedError, match="NCCL has no tags"):
            hybridcomm.isend(tensor, other, tag=1, group=host)
        with pytest.raises(UnsupportedError, match="NCCL has no tags"):
            hybridcomm.batch_isend_irecv([P2POp(hybridcomm.irecv, tensor, other, host, tag=2)])
        with pytest.raises(UnsupportedError, match="name the sender"):
            hybridcomm.recv(tensor, None, group=host)
        with pytest.raises(UnsupportedError, match="sends to itself"):
            hybridcomm.isend(tensor, rank.rank, group=host)
        with pytest.raises(UnsupportedError, match="is of one per rank"):
            host.connect_device(provider=rank.torch)
        with pytest.raises(DataTypeError, match="this rank's GPU is"):
            hybridcomm.empty(8, device="cuda:7", group=host)
        for bad, why in (
            (torch.ones(8), "a block each"),
            (rank.upload(torch.ones(8).double()), "one collective"),
        ):
            with hybridcomm.coalescing(host):
                hybridcomm.allreduce(tensor, group=host)
                with pytest.raises(UnsupportedError, match=why):
                    hybridcomm.allreduce(bad, group=host)
        with pytest.raises(UnsupportedError, match="cannot be a part"), hybridcomm.coalescing(host):
            hybridcomm.broadcast(tensor, 0, host)
        with pytest.raises(UnsupportedError, match="cannot be a part"), hybridcomm.coalescing(host):
            hybridcomm.allreduce(tensor, group=host, async_op=True)
        sent, into = [5, 3] if rank.rank else [3, 5], rank.upload(torch.zeros(8))
        with pytest.raises(PlanMismatchError, match="rank 0 sends 5 elements to rank 1, which expects 3"):
            hybridcomm.all_to_all_single(into, tensor, [3, 5], sent, host)

    results, reports = run_devices(TWO, body)
    assert results == [None] * 2
    assert reports == []


def test_memory_on_the_device_is_asked_for_by_name() -> None:
    def body(rank: Rank) -> list[Any]:
        ours = hybridcomm.empty(4, 8, dtype=torch.bfloat16, device="cuda", group=rank.host)
        shared = hybridcomm.empty(8, dtype=torch.float32, group=rank.host)
        return [rank.torch.owns(ours), tuple(ours.shape), ours.dtype, rank.torch.owns(shared)]

    results, reports = run_devices(TWO, body)
    assert results == [[True, (4, 8), torch.bfloat16, False]] * 2
    assert reports == []


def test_in_debug_mode_a_rank_with_a_tensor_of_its_host_is_told_at_once() -> None:
    def body(rank: Rank) -> str:
        tensor = numbers(64, 0) if rank.rank else rank.upload(numbers(64, 0))
        try:
            hybridcomm.allreduce(tensor, group=rank.host)
        except HybridCommError as error:
            return type(error).__name__
        return "nothing"

    results, _ = run_devices(TWO, body, debug=True)
    assert results == ["PlanMismatchError"] * 2


def test_a_reducer_goes_where_its_module_lies() -> None:
    def body(rank: Rank) -> list[bool]:
        module = nn.Linear(8, 8)
        on_device(rank, module)
        reducer = hybridcomm.Reducer(module, ctx=rank.host)
        on_host = hybridcomm.Reducer(nn.Linear(8, 8), ctx=rank.host)
        found = [reducer.ctx is rank.host.device, on_host.ctx is rank.host]
        reducer.close()
        on_host.close()
        rank.torch.synchronize()
        for parameter in module.parameters():
            rank.torch.drop(parameter.data)
            assert parameter.grad is not None
            rank.torch.drop(parameter.grad)
        return found

    results, reports = run_devices(TWO, body)
    assert results == [[True, True]] * 2
    assert reports == []


def test_init_connects_a_device_and_shutdown_closes_both(
    found: threading.local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRIDCOMM_CUDA", str(library()))
    monkeypatch.setenv("HYBRIDCOMM_NCCL", str(library()))
    with Simulation(threads=1) as simulation:
        simulation.nccl_version(21805)
        found.provider = provider = SimulatedTorch(simulation, 0)
        context = hybridcomm.init(rank=0, world_size=1, device="cuda")
        device = context.device
        assert device is not None
        tensor = provider.upload(numbers(64, 3))
        hybridcomm.allreduce(tensor)
        assert device._calls == 1
        assert torch.equal(provider.download(tensor), numbers(64, 3))
        hybridcomm.shutdown()
        with pytest.raises(HybridCommError, match="closed"):
            device.allreduce(tensor)
        with pytest.raises(HybridCommError, match="init"):
            hybridcomm.allreduce(tensor)
        del found.provider
        with pytest.raises(UnsupportedError, match="no GPU"):
            hybridcomm.init(rank=0, world_size=1, device="cuda")
        with pytest.raises(HybridCommError, match="init"):
            hybridcomm.default_context()  # what could not connect is no context
        del tensor, device, context
        provider.close()
        assert simulation.finish() == []
        provider.over = True
