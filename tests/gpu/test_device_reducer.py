"""The Reducer on simulated GPUs: a training of twenty steps, and the host backend's bits after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from hybridcomm.errors import DataTypeError
from hybridcomm.reducer import Reducer
from hybridcomm.topology import Topology
from tests.gpu.device_ranks import Rank, run_devices

pytestmark = pytest.mark.xdist_group("gpu-engine")

STEPS = 20


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products of matrices in several threads may differ in the last bit from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model() -> nn.Module:
    """The same whichever ranks, threads of one process, make theirs meanwhile."""
    made = nn.Sequential(
        nn.Embedding(64, 96), nn.Linear(96, 160), nn.GELU(), nn.LayerNorm(160), nn.Linear(160, 64)
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made


def on_device(rank: Rank, module: nn.Module) -> None:
    """Parameters, and their gradients, count as the device's memory."""
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
        rank.torch.adopt(parameter.data)
        rank.torch.adopt(parameter.grad)


def train(
    rank: Rank, ctx: Any, module: nn.Module, *, compress: Any, at: Callable[[str], None], steps: int = STEPS
) -> list[torch.Tensor]:
    """Parameters after each step; every fifth is skipped. ``at``: told before the host touches tensors itself."""
    reducer = Reducer(module, ctx=ctx, compress=compress, bucket_cap_mb=0.04)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    seen = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * step + rank.rank)
        items = torch.randint(64, (32,), generator=generator)
        at("backward")
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(module(items), items.flip(0)).backward()
        reducer.finalize()
        at("step")
        if step % 5 == 4:
            reducer.rollback()
        else:
            optimizer.step()
            reducer.commit()
        seen.append(torch.cat([p.detach().flatten().clone() for p in module.parameters()]))
    reducer.close()
    return seen


def compared(compress: Any, steps: int = STEPS) -> Callable[[Rank], list[int]]:
    """The steps after which parameters differ."""

    def body(rank: Rank) -> list[int]:
        wanted = train(rank, rank.host, model(), compress=compress, at=lambda _: None, steps=steps)
        module = model()
        on_device(rank, module)

        def at(what: str) -> None:
            """The host computes what a GPU would: it has to wait for the stream first, and says what it touches."""
            rank.torch.synchronize()
            for parameter in module.parameters():
                rank.torch.writes(parameter.data, what)
                rank.torch.writes(parameter.grad, what)

        found = train(rank, rank.device, module, compress=compress, at=at, steps=steps)
        rank.torch.synchronize()
        for parameter in module.parameters():
            rank.torch.drop(parameter.data)
            rank.torch.drop(parameter.grad)
        return [step for step, pair in enumerate(zip(wanted, found, strict=True)) if not torch.equal(*pair)]

    return body


@pytest.mark.parametrize("compress", ["topk:0.01", "int8", "gtop1"])
@pytest.mark.parametrize("seed", [1, 2])
def test_twenty_steps_give_the_hosts_bits(compress: str, seed: int) -> None:
    results, reports = run_devices(
        Topology.virtual(2, 2), compared(compress), seed=seed, eager_percent=60, flat=False
    )
    assert results == [[]] * 4
    assert reports == []


def test_a_schedule_that_ends_dense_delivers_what_was_left_as_the_host_does() -> None:
    """With blocks of which buckets hold an even number, so that both cut shards alike: who delivers what was left adds
    it to its own gradient first, which rounds."""
    results, reports = run_devices(Topology.virtual(2, 2), compared("int8,none@10"), seed=3, flat=False)
    assert results == [[]] * 4
    assert reports == []


def test_parameters_on_another_device_than_the_context_are_refused() -> None:
    def body(rank: Rank) -> None:
        with pytest.raises(DataTypeError, match=r"hybridcomm\.init"):
            Reducer(model().to("meta"), ctx=rank.host)

    run_devices(Topology.virtual(1, 2), body)
