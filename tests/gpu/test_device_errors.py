"""What CUDA answers wrongly is a `DeviceError` that names the call, CUDA's words, the device and what to do."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from hybridcomm.errors import AbortedError, DeviceError, HybridCommError, PeerLostError, StallError
from hybridcomm.stream_provider import TorchCuda
from hybridcomm.topology import Topology
from tests.gpu.device_ranks import Rank, run_devices
from tests.gpu.simulated import Fault

pytestmark = pytest.mark.xdist_group("gpu-engine")

OUT_OF_MEMORY, INVALID_IMAGE, INVALID_HANDLE, ILLEGAL_ADDRESS = 2, 200, 400, 700
STALL_S = 3.0


def reduce(rank: Rank) -> None:
    work = rank.device.allreduce(rank.upload(torch.ones(1 << 13)), compress="topk:0.01", async_op=True)
    work.synchronize()


def outcomes(body: Callable[[Rank], None], **options: object) -> list[HybridCommError | None]:
    """What each rank's body raises, of the library's errors."""
    found: list[HybridCommError | None] = [None, None]

    def ranked(rank: Rank) -> None:
        try:
            body(rank)
        except HybridCommError as error:
            found[rank.rank] = error

    run_devices(
        Topology.virtual(2, 1), ranked, stall_s=STALL_S, return_exceptions=True, **{"watch": 0.05, **options}
    )
    return found


def on_rank_1(call: str, code: int, do: Callable[[Rank], object] = reduce) -> list[HybridCommError | None]:
    def body(rank: Rank) -> None:
        if rank.rank == 1:
            rank.torch.simulation.refuse(call, code, device=1)
            do(rank)

    return outcomes(body)


@pytest.mark.parametrize(
    ("call", "code", "name", "advice", "do"),
    [
        ("cuMemAlloc_v2", OUT_OF_MEMORY, "OUT_OF_MEMORY", "out of memory: the device's memory is full", None),
        ("cuModuleLoadData", INVALID_IMAGE, "INVALID_IMAGE", "no shipped kernel runs here", reduce),
        ("cuEventRecord", INVALID_HANDLE, "INVALID_HANDLE", "look for an earlier error", reduce),
        (
            "cuLaunchKernel",
            ILLEGAL_ADDRESS,
            "ILLEGAL_ADDRESS",
            "context is lost, so end this process",
            reduce,
        ),
    ],
)
def test_the_error_names_call_code_device_and_what_to_do(
    call: str, code: int, name: str, advice: str, do: Callable[[Rank], object] | None
) -> None:
    error = on_rank_1(call, code, do or (lambda rank: rank.device.empty(64)))[1]
    assert isinstance(error, DeviceError), error
    plain = call.removesuffix("_v2")
    assert (error.call, error.name, error.code) == (plain, f"CUDA_ERROR_{name}", code)
    assert (error.device, error.lost) == (1, code == ILLEGAL_ADDRESS)
    assert str(error).startswith(f"{plain} on device 1: CUDA_ERROR_{name} ({code})")
    assert advice in str(error)


def test_memory_that_ran_out_leaves_the_engine_as_it_was() -> None:
    def body(rank: Rank) -> None:
        rank.torch.simulation.refuse("cuMemAlloc_v2", OUT_OF_MEMORY, device=rank.rank)
        with pytest.raises(DeviceError, match="out of memory"):
            rank.device.empty(64)
        reduce(rank)

    assert outcomes(body) == [None, None]


@pytest.mark.parametrize("watch", [0.05, 0.0])
def test_a_lost_device_raises_there_and_ends_the_peers(watch: float) -> None:
    """Also where nobody watches: the rank's own call finds it, and tells."""

    def body(rank: Rank) -> None:
        tensor = rank.upload(torch.ones(64))
        reduce(rank)
        rank.host.barrier()
        if rank.rank == 1:
            rank.torch.simulation.inject(Fault.BREAKS, device=1, operation=0)
            rank.torch.lost = True
        begin = time.monotonic()
        try:
            for _ in range(2):
                rank.device.allreduce(tensor, async_op=True).synchronize()
        finally:
            assert time.monotonic() - begin < 10 * STALL_S

    first, second = outcomes(body, watch=watch)
    assert isinstance(second, DeviceError), second
    assert (second.name, second.lost, second.device) == ("CUDA_ERROR_ILLEGAL_ADDRESS", True, 1)
    assert isinstance(first, (PeerLostError, AbortedError, StallError)), first


def test_the_watchdog_names_cudas_error_and_not_nccls_word_for_it() -> None:
    """Nobody calls anything: NCCL is the first to say that CUDA has failed."""

    def body(rank: Rank) -> None:
        if rank.rank == 1:
            rank.torch.simulation.inject(Fault.BREAKS, device=1, operation=0)
            rank.torch.lost = True
        until = time.monotonic() + 10 * STALL_S
        while rank.rank == 1 and time.monotonic() < until:
            rank.device._engine.check()
            time.sleep(0.01)

    second = outcomes(body)[1]
    assert isinstance(second, DeviceError), second
    assert (second.call, second.name) == ("cuStreamQuery", "CUDA_ERROR_ILLEGAL_ADDRESS")


def test_every_later_call_raises_the_same() -> None:
    def body(rank: Rank) -> None:
        if rank.rank == 1:
            rank.torch.simulation.refuse("cuLaunchKernel", ILLEGAL_ADDRESS, device=1)
            with pytest.raises(DeviceError, match="cuLaunchKernel"):
                reduce(rank)
            reduce(rank)

    assert isinstance(outcomes(body)[1], DeviceError)


def test_without_a_fault_nothing_is_raised() -> None:
    """The control: the same calls."""
    assert outcomes(reduce) == [None, None]


def test_torchs_own_lack_of_memory_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = object.__new__(TorchCuda)
    provider.ordinal, provider.device = 3, torch.device("cuda", 3)

    def refuse(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(DeviceError, match="Tried to allocate") as caught:
        provider.empty(1 << 31)
    assert (caught.value.device, caught.value.code) == (3, OUT_OF_MEMORY)
