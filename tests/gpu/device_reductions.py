"""All-reduces that GPU ranks do together, and what tells whether their values are right; see `device_scenarios`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hybridcomm.residual import Residual
from tests.gpu.device_ranks import Rank, gradient

__all__ = [
    "CODEC", "SMALL", "again", "all_differ", "buckets", "differ", "numbers", "overlap", "put", "streams", "total",
    "two_stage", "unequal", "uneven",
]  # fmt: skip

CODEC = "topk:0.01"
SMALL = 1 << 13


def differ(what: str, got: torch.Tensor, want: torch.Tensor) -> Iterator[str]:
    if not torch.equal(got, want):
        yield f"value: {what}, {int((got != want).sum())} of {want.numel()} elements"


def all_differ(rank: Rank, tensors: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> list[str]:
    pairs = enumerate(zip(tensors, want, strict=True))
    return [line for i, (t, w) in pairs for line in differ(f"tensor {i}", rank.download(t), w)]


def numbers(numel: int, rank: int) -> torch.Tensor:
    """Small integers, whose sums are exact in any order."""
    return (torch.arange(numel) % 7 - 3 + rank).to(torch.float32)


def total(rank: Rank, numel: int) -> torch.Tensor:
    return sum((numbers(numel, other) for other in range(rank.device.world_size)), torch.zeros(numel))


def put(rank: Rank, tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    sources = [rank.upload(each) for each in values]
    rank.torch.copy(tensors, sources)
    rank.torch.synchronize()  # before the sources go


def buckets(rank: Rank) -> list[str]:
    """Three under way together with a residual; the same tensors in each step, one of which is rolled back."""
    sizes = (SMALL, SMALL, 2 * SMALL)
    on_host, on_device, wrong = Residual(), Residual(), []
    tensors = [rank.upload(torch.zeros(numel)) for numel in sizes]
    for step in range(3):
        want = [gradient(numel, rank.rank, 3 * step + i) for i, numel in enumerate(sizes)]
        put(rank, tensors, want)
        works = []
        for i, tensor in enumerate(tensors):
            shared = {"op": "mean", "compress": CODEC, "residual_key": f"{i}"}
            rank.host.allreduce(want[i], residual=on_host, **shared)
            works.append(rank.device.allreduce(tensor, residual=on_device, async_op=True, **shared))
        for work in works if rank.rank % 2 else reversed(works):  # the order of waits is a rank's own
            work.wait()
        wrong += all_differ(rank, tensors, want)
        for residual in (on_host, on_device):
            residual.rollback() if step == 1 else residual.commit()
    kept, wanted = on_device.state_dict(), on_host.state_dict()
    return wrong + [f"value: residual {k}" for k in wanted if not (kept[k] == wanted[k]).all()]


def again(rank: Rank) -> list[str]:
    """The same tensor several times, nobody waiting in between; the last wait is for all of them."""
    compressed = rank.upload(gradient(SMALL, rank.rank, 1))
    dense = rank.upload(numbers(4096, rank.rank))
    want, works = gradient(SMALL, rank.rank, 1), []
    for flat in (True, False, True):
        rank.host.allreduce(want, compress="bf16")
        works.append(rank.device.allreduce(compressed, compress="bf16", async_op=True))
        works.append(rank.device.allreduce(dense, flat=flat, async_op=True))
    for work in works[-2:]:
        work.wait()
    factor = rank.device.world_size**2
    return all_differ(rank, [compressed, dense], [want, total(rank, 4096) * factor])


def unequal(rank: Rank) -> list[str]:
    """Nodes of unequal size; routes beside NCCL's own algorithm, sums beside means."""
    tensors = [rank.upload(numbers(4096, rank.rank)) for _ in range(3)]
    rank.device.allreduce(tensors[0], flat=True, async_op=True)
    rank.device.allreduce(tensors[1], flat=False, async_op=True)
    rank.device.allreduce(tensors[2], flat=False, op="max", async_op=True)
    compressed, want = rank.upload(gradient(SMALL, rank.rank, 2)), gradient(SMALL, rank.rank, 2)
    rank.host.allreduce(want, op="mean", compress="int8")
    works = [rank.device.allreduce(compressed, op="mean", compress="int8", async_op=True)]
    works += [rank.device.allreduce(tensors[0], op="mean", async_op=True)]
    for work in works:
        work.wait()
    for tensor in tensors[1:]:
        rank.device.allreduce(tensor, op="max")
    sums = total(rank, 4096)
    most = numbers(4096, rank.device.world_size - 1)
    got = rank.download(tensors[0])
    wrong = [] if torch.allclose(got, sums, rtol=1e-6, atol=1e-5) else ["value: a mean of sums"]
    return wrong + all_differ(rank, [*tensors[1:], compressed], [sums, most, want])


def uneven(rank: Rank) -> list[str]:
    """Shards of unequal size: reduces and broadcasts of their own instead of one call for all."""
    dense, compressed = rank.upload(numbers(4099, rank.rank)), rank.upload(torch.zeros(3 * 4096))
    wrong = []
    for step in range(2):
        want = gradient(3 * 4096, rank.rank, step)
        source = rank.upload(want)
        rank.host.allreduce(want, op="mean", compress=CODEC)
        rank.torch.copy([compressed], [source])
        works = [rank.device.allreduce(compressed, op="mean", compress=CODEC, async_op=True)]
        works.append(rank.device.allreduce(dense, flat=False, async_op=True))
        for work in works:
            work.wait()
        wrong += all_differ(rank, [compressed], [want])
    return wrong + all_differ(rank, [dense], [total(rank, 4099) * rank.device.world_size])


def two_stage(rank: Rank) -> list[str]:
    """Payloads to a root, their sum encoded anew, with both residuals; two tensors under way."""
    on_host, on_device, wrong = Residual(), Residual(), []
    tensors = [rank.upload(torch.zeros(3 * SMALL)) for _ in range(2)]
    for step in range(2):
        want = [gradient(3 * SMALL, rank.rank, 2 * step + i) for i in range(2)]
        put(rank, tensors, want)
        works = []
        for i, tensor in enumerate(tensors):
            shared = {"op": "mean", "compress": "int8", "exchange": "two_stage", "residual_key": f"{i}"}
            rank.host.allreduce(want[i], residual=on_host, **shared)
            works.append(rank.device.allreduce(tensor, residual=on_device, async_op=True, **shared))
        for work in works:
            work.wait()
        wrong += all_differ(rank, tensors, want)
        on_host.commit()
        on_device.commit()
    return wrong


def overlap(rank: Rank) -> list[str]:
    """Programs whose memory overlaps, each begun while the one before is under way; halves have a tail, too."""
    numel = 2 * SMALL
    whole = rank.upload(gradient(numel, rank.rank, 3))
    want = gradient(numel, rank.rank, 3)
    works = []
    for part, compress in ((slice(0, numel), "bf16"), (slice(0, SMALL), "bf16"), (slice(SMALL, numel), "fp16"),
                           (slice(0, numel), None), (slice(0, SMALL), "bf16")):  # fmt: skip
        rank.host.allreduce(want[part], compress=compress, op="mean")
        works.append(rank.device.allreduce(whole[part], compress=compress, op="mean", async_op=True))
    works[-1].wait()
    works[2].wait()
    return all_differ(rank, [whole], [want])


def streams(rank: Rank) -> list[str]:
    """A result that another stream waits for, and a tensor that another stream makes; the second round has programs
    that are made, for which the host does not wait."""
    first, second = (rank.upload(torch.zeros(SMALL)) for _ in range(2))
    copies = [rank.upload(torch.zeros(SMALL)) for _ in range(2)]
    wrong = []
    for step in range(2):
        want = [gradient(SMALL, rank.rank, 4 + 2 * step + i) for i in range(2)]
        sources = [rank.upload(each) for each in want]
        for each in want:
            rank.host.allreduce(each, compress=CODEC)
        rank.torch.copy([first], sources[:1])
        work = rank.device.allreduce(first, compress=CODEC, async_op=True)
        with rank.torch.other_stream() as other:
            work.wait(other)
            rank.torch.copy([copies[0], second], [first, sources[1]])
            rank.device.allreduce(second, compress=CODEC, stream=other)
            rank.torch.copy(copies[1:], [second])
        wrong += all_differ(rank, copies, want)
    return wrong
