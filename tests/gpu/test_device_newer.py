"""What GPUs do where NCCL is newer than 2.18: the same results, by calls that it has."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from hybridcomm import device_comms
from hybridcomm.device_context import DeviceContext
from hybridcomm.errors import UnsupportedError
from hybridcomm.reducer import Reducer
from hybridcomm.selftest.rank import differ, numbers, total
from hybridcomm.topology import Topology
from tests.gpu.device_ranks import NCCL, Rank, run_devices
from tests.gpu.simulated import Simulation, sim_library

pytestmark = pytest.mark.xdist_group("gpu-engine")

TWO = Topology.virtual(2, 1)
NEWEST, BEFORE_ALL_TO_ALL = 23007, 22707


def kinds(rank: Rank) -> list[str]:
    """Of all operations that were made for calls so far."""
    made = [*rank.device._programs.values(), *rank.device._exchanges.values()]
    return [op.kind for _, lowered, _ in made for op in lowered.operations]


@pytest.mark.parametrize(("version", "one_call"), [(NCCL, False), (BEFORE_ALL_TO_ALL, False), (NEWEST, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_an_all_to_all_of_equal_parts_is_one_call_where_nccl_has_it(
    version: int, one_call: bool, dtype: torch.dtype
) -> None:
    def body(rank: Rank) -> tuple[list[str], torch.Tensor]:
        source = rank.upload(numbers(12, rank.rank).to(dtype).view(6, 2))
        out = rank.upload(torch.zeros(6, 2).to(dtype))
        rank.device.all_to_all_single(out, source)
        return kinds(rank), rank.download(out)

    results, reports = run_devices(Topology.from_sizes((2, 1)), body, nccl=version)
    assert reports == []
    for me, (made, out) in enumerate(results):
        want = torch.cat([numbers(12, r).to(dtype).view(3, 2, 2)[me] for r in range(3)])
        assert torch.equal(out, want)
        assert made == (["all_to_all"] if one_call else ["receive", "send"] * 3)


def test_an_all_to_all_of_unequal_parts_stays_sends_and_receives() -> None:
    """Also on the rank whose own parts are equal, and where there is nothing to move at all."""
    rows = [[2, 2], [2, 4]]

    def body(rank: Rank) -> list[str]:
        source, out = (rank.upload(torch.zeros(sum(rows[rank.rank]))) for _ in range(2))
        rank.device.all_to_all_single(out, source, rows[rank.rank], rows[rank.rank])
        nothing = [rank.upload(torch.zeros(0)) for _ in range(2)]
        rank.device.all_to_all_single(*nothing)
        return kinds(rank)

    results, reports = run_devices(Topology.virtual(2, 1), body, nccl=NEWEST)
    assert reports == []
    assert all(set(made) == {"send", "receive"} for made in results)


@pytest.mark.parametrize(
    ("version", "symmetric", "windows"),
    [
        (NCCL, True, False),
        (21903, True, False),
        (22703, True, True),
        (NEWEST, True, True),
        (NEWEST, False, False),
    ],
)
def test_memory_that_all_ranks_allocate_becomes_windows_where_nccl_has_them(
    version: int, symmetric: bool, windows: bool
) -> None:
    """One in every communicator that the rank is in; what one rank allocates alone becomes none."""

    def body(rank: Rank) -> tuple[int, int, int]:
        engine, comms = rank.device._engine, sorted(rank.device._comms.values())
        rank.torch.simulation.symmetric(symmetric)
        together = engine.allocate(4096, comms)
        alone = engine.allocate(4096) if rank.rank == 1 else None
        return together.windows, 0 if alone is None else alone.windows, len(comms)

    results, reports = run_devices(Topology.virtual(2, 2), body, nccl=version)
    with Simulation() as simulation:
        simulation.symmetric(True)
    assert reports == []
    assert results == [(3 * windows, 0, 3)] * 4


def test_the_buckets_of_a_reducer_are_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, int]] = []

    def body(rank: Rank) -> int:
        module = torch.nn.Linear(64, 64)
        rank.torch.place(module)
        made = Reducer(module, ctx=rank.device)
        made.close()
        rank.torch.synchronize()
        return len(made.layouts)

    real = DeviceContext._empty

    def noted(self: DeviceContext, size: Any, dtype: Any, windows: Any) -> Any:
        found.append((self.rank, len(windows)))
        return real(self, size, dtype, windows)

    monkeypatch.setattr(DeviceContext, "_empty", noted)
    results, reports = run_devices(Topology.virtual(2, 2), body, nccl=NEWEST)
    assert reports == []
    assert sorted(found) == sorted((rank, 3) for rank in range(4) for _ in range(results[rank]))


@pytest.mark.parametrize("aborts", [False, True])
def test_windows_outlive_their_communicators_to_no_harm(aborts: bool) -> None:
    """Closed, or aborted, before the memory goes: nothing is asked of communicators that are no more."""

    def body(rank: Rank) -> None:
        tensor = rank.device.bucket(1024)
        if aborts:
            rank.device.abort()
        rank.device.close()
        del tensor

    _, reports = run_devices(Topology.virtual(2, 1), body, nccl=NEWEST)
    assert reports == []


def raised(rank: Rank, **options: Any) -> str:
    """What connecting raises; or how many of the rank's communicators leave windows to copy engines."""
    try:
        device = rank.host.connect_device(provider=rank.torch, watch=0, **options)
    except UnsupportedError as error:
        return str(error)
    rank.host.barrier()
    found = rank.torch.simulation.by_copy_engines(rank.rank)
    rank.host.barrier()
    return f"{found} {'copy engines' in device.describe()}"


@pytest.mark.parametrize(
    ("asked", "said", "found"),
    [
        (None, "", "0 False"),
        (None, "0", "0 False"),
        (None, "1", "3 True"),
        (True, "", "3 True"),
        (False, "1", "0 False"),
    ],
)
def test_copy_engines_are_asked_for_by_argument_or_environment(
    monkeypatch: pytest.MonkeyPatch, asked: bool | None, said: str, found: str
) -> None:
    monkeypatch.setenv("HYBRIDCOMM_COPY_ENGINES", said)
    results, reports = run_devices(
        Topology.virtual(2, 2), lambda rank: raised(rank, copy_engines=asked), nccl=NEWEST, connect=False
    )
    assert reports == []
    assert results == [found] * 4


@pytest.mark.parametrize(("version", "said"), [(22707, "1"), (NEWEST, "yes")])
def test_copy_engines_that_cannot_be_had_are_refused(
    monkeypatch: pytest.MonkeyPatch, version: int, said: str
) -> None:
    """By every rank, with what to do; nothing is silently left out."""
    monkeypatch.setenv("HYBRIDCOMM_COPY_ENGINES", said)
    results, _ = run_devices(TWO, raised, nccl=version, connect=False)
    want = "2.28.3" if said == "1" else "set it to 1 or 0"
    assert all(want in text and "HYBRIDCOMM_COPY_ENGINES" in text for text in results), results


def test_ranks_that_contradict_each_other_over_copy_engines_are_named() -> None:
    results, _ = run_devices(
        TWO, lambda rank: raised(rank, copy_engines=rank.rank == 1), nccl=NEWEST, connect=False
    )
    assert all("rank 1 has" in text and "copy engines" in text for text in results), results


@pytest.mark.parametrize("world", [1, 2, 3, 7, 128, 129, 300, 1000])
@pytest.mark.parametrize("per_root", [1, 2, 128])
def test_roots_have_equal_shares_of_at_most_so_many_ranks(world: int, per_root: int) -> None:
    roots = device_comms.roots_of(world, per_root)
    shares = [end - begin for begin, end in pairwise([*roots, world])]
    assert roots[0] == 0
    assert max(shares) <= per_root
    assert max(shares) - min(shares) <= 1
    assert sorted(shares, reverse=True) == shares  # as NCCL shares ranks out


@pytest.mark.parametrize(
    ("version", "per_root", "roots"),
    [(NCCL, 1, 0), (22304, 2, 2), (NEWEST, 1, 3), (NEWEST, 3, 0), (NEWEST, 128, 0)],
)
def test_ranks_meet_at_several_roots_where_there_are_many(version: int, per_root: int, roots: int) -> None:
    """0: the call of one id is taken, which older ones have, too."""

    def body(rank: Rank) -> list[str]:
        rank.device._comms = device_comms.connect(rank.device._engine, rank.host, per_root=per_root)
        tensor = rank.upload(numbers(64, rank.rank))
        rank.device.allreduce(tensor)
        return list(differ("a sum", rank.download(tensor), total(rank, 64)))

    before = sim_library().sim_roots()
    results, reports = run_devices(Topology.from_sizes((2, 1)), body, nccl=version)
    assert results == [[]] * 3
    assert reports == []
    assert sim_library().sim_roots() == (roots or before)
