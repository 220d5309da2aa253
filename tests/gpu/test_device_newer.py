"""What GPUs do where NCCL is newer than 2.18: the same results, by calls that it has."""

from __future__ import annotations

import pytest
import torch

from hybridcomm.selftest.rank import numbers
from hybridcomm.topology import Topology
from tests.gpu.device_ranks import NCCL, Rank, run_devices

pytestmark = pytest.mark.xdist_group("gpu-engine")

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
