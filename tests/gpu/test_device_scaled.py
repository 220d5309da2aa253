"""premul_sum of tensors on GPUs: what is refused, and factors that change; the scenario "scaled" has the values."""

from __future__ import annotations

import pytest
import torch

import hybridcomm
from hybridcomm.errors import UnsupportedError
from hybridcomm.selftest.rank import all_differ, numbers
from hybridcomm.topology import Topology
from tests.gpu.device_ranks import Rank, run_devices

pytestmark = pytest.mark.xdist_group("gpu-engine")

TWO = Topology.virtual(2, 1)


@pytest.mark.parametrize(
    ("dtype", "factor", "match"),
    [
        (torch.bfloat16, 0.1, r"such as 0\.10009765625"),
        (torch.float16, 1e6, "pass a smaller one"),
        (torch.int32, 0.5, "whole factor"),
    ],
)
def test_factors_that_nccl_would_change_are_refused(dtype: torch.dtype, factor: float, match: str) -> None:
    """Hosts multiply 16-bit elements by a factor of 32 bits."""

    def body(rank: Rank) -> int:
        tensor, out = rank.upload(torch.ones(8).to(dtype)), rank.upload(torch.ones(4).to(dtype))
        op = hybridcomm.premul_sum(factor)
        for call in (
            lambda: rank.device.allreduce(tensor, op=op),
            lambda: rank.device.reduce(tensor, 0, op=op),
            lambda: rank.device.reduce_scatter_tensor(out, tensor, op=op),
        ):
            with pytest.raises(UnsupportedError, match=match):
                call()
        return 3

    results, reports = run_devices(TWO, body)
    assert results == [3, 3]
    assert reports == []


def test_compressed_sums_take_no_factor() -> None:
    def body(rank: Rank) -> str:
        with pytest.raises(UnsupportedError, match="cannot be compressed") as caught:
            rank.device.allreduce(
                rank.upload(torch.ones(1 << 13)), op=hybridcomm.premul_sum(2.0), compress="int8"
            )
        return str(caught.value)

    results, _ = run_devices(TWO, body)
    assert len(set(results)) == 1


def test_factors_of_a_rank_are_no_contradiction_and_do_not_gather() -> None:
    """In debug mode ranks compare calls; more factors than are kept, of each rank another, in a block too."""

    def body(rank: Rank) -> list[str]:
        tensors = [rank.upload(numbers(16, rank.rank)) for _ in range(3)]
        source = rank.upload(numbers(16, rank.rank))
        for step in range(300):
            away = float(step + 2) if rank.rank else 1.0
            rank.device.allreduce(tensors[0], op=hybridcomm.premul_sum(away))
            rank.torch.copy([tensors[0]], [source])
        rank.device.allreduce(tensors[0], op=hybridcomm.premul_sum(3.0 + rank.rank))
        with rank.device.coalescing():
            for each in tensors[1:]:
                rank.device.allreduce(each, op=hybridcomm.premul_sum(3.0 + rank.rank))
        want = 3 * numbers(16, 0) + 4 * numbers(16, 1)
        return all_differ(rank, tensors, [want] * 3)

    results, reports = run_devices(TWO, body, debug=True)
    assert results == [[]] * 2
    assert reports == []
