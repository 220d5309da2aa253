"""Messages between simulated GPUs, beside those of their hosts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybridcomm import device_collectives
from hybridcomm.errors import UnsupportedError
from hybridcomm.selftest.rank import numbers
from hybridcomm.topology import Topology
from tests.gpu.device_ranks import Rank, run_devices

pytestmark = pytest.mark.xdist_group("gpu-engine")


def test_hosts_arrays_go_by_the_host_and_tags_tell_them_apart() -> None:
    def body(rank: Rank) -> list[float]:
        first, second = np.full(3, 1.0), np.full(3, 2.0)
        if rank.rank == 0:
            rank.device.isend(first, 1, 5)
            rank.device.send(second, 1, 6)
            return []
        work = rank.device.irecv(first, 0, 6)
        rank.device.recv(second, 0, 5)
        work.wait()
        return [first[0], second[0]]

    results, reports = run_devices(Topology.virtual(1, 2), body)
    assert results == [[], [2.0, 1.0]]
    assert reports == []


def test_only_those_between_whom_it_goes_take_part_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where ranks compare what all of them call; programs of more messages than are kept are made again."""
    monkeypatch.setattr(device_collectives, "_EXCHANGES", 1)

    def body(rank: Rank) -> list[bool]:
        tensors = [rank.upload(numbers(64, 10 * rank.rank + i)) for i in range(2)]
        if rank.rank == 0:
            for tensor in tensors:
                rank.device.send(tensor, 1)
        elif rank.rank == 1:
            assert rank.device.recv(tensors[0], 0) == 0
            rank.device.irecv(tensors[1], 0).wait()
        rank.device.allreduce(sums := rank.upload(numbers(64, rank.rank)))
        total = sum((numbers(64, other) for other in range(3)), torch.zeros(64))
        wanted = [numbers(64, 10 * max(rank.rank - 1, 0) + i) for i in range(2)]
        pairs = [*zip(tensors, wanted, strict=True)] if rank.rank < 2 else []
        return [torch.equal(rank.download(got), want) for got, want in [*pairs, (sums, total)]]

    results, reports = run_devices(Topology.virtual(1, 3), body, debug=True)
    assert results == [[True] * 3, [True] * 3, [True]]
    assert reports == []


def test_a_tag_between_gpus_is_refused() -> None:
    def body(rank: Rank) -> None:
        tensor = rank.upload(numbers(64, 0))
        for call in (rank.device.isend, rank.device.irecv, rank.device.send, rank.device.recv):
            with pytest.raises(UnsupportedError, match="tag=4: messages between GPUs have none"):
                call(tensor, 1 - rank.rank, 4)

    run_devices(Topology.virtual(1, 2), body)
