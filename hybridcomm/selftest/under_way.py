"""Cases of all-reduces that are under way together: several buckets, overlaps, streams, graphs, the Reducer.

Each is called on every rank with what is its own, and returns what is wrong: values that are not the host's bits, or
not the exact sums of integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hybridcomm.reducer import Reducer
from hybridcomm.residual import Residual
from hybridcomm.selftest.rank import Rank, all_differ, differ, gradient, near, numbers, put, total
from hybridcomm.selftest.reductions import same_residual

__all__ = [
    "CODEC", "SMALL", "again", "buckets", "captured", "in_known_memory", "in_windows", "overlap", "reducer", "streams",
    "two_stage", "unequal", "uneven",
]  # fmt: skip

CODEC = "topk:0.01"
SMALL = 1 << 13


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
            shared: dict[str, Any] = {"op": "mean", "compress": CODEC, "residual_key": f"{i}"}
            rank.host.allreduce(want[i], residual=on_host, **shared)
            works.append(rank.device.allreduce(tensor, residual=on_device, async_op=True, **shared))
        for work in works if rank.rank % 2 else reversed(works):  # the order of waits is a rank's own
            work.wait()
        wrong += all_differ(rank, tensors, want)
        for residual in (on_host, on_device):
            residual.rollback() if step == 1 else residual.commit()
    return wrong + same_residual(on_device, on_host)


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
    return all_differ(rank, [compressed, dense], [want, total(rank, 4096) * rank.world**2])


def unequal(rank: Rank) -> list[str]:
    """Routes beside NCCL's own algorithm, sums beside means: what nodes of unequal size do otherwise."""
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
    most = numbers(4096, rank.world - 1)
    wrong = list(
        near("a mean of sums", rank.download(tensors[0]), sums.double(), sums.abs().double(), rank.world)
    )
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
    return wrong + all_differ(rank, [dense], [total(rank, 4099) * rank.world])


def two_stage(rank: Rank) -> list[str]:
    """Payloads to a root, their sum encoded anew, with both residuals; two tensors under way."""
    on_host, on_device, wrong = Residual(), Residual(), []
    tensors = [rank.upload(torch.zeros(3 * SMALL)) for _ in range(2)]
    for step in range(2):
        want = [gradient(3 * SMALL, rank.rank, 2 * step + i) for i in range(2)]
        put(rank, tensors, want)
        works = []
        for i, tensor in enumerate(tensors):
            shared: dict[str, Any] = {
                "op": "mean", "compress": "int8", "exchange": "two_stage", "residual_key": f"{i}",
            }  # fmt: skip
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
        op = "mean" if compress else "max"  # which is exact in any order
        rank.host.allreduce(want[part], compress=compress, op=op)
        works.append(rank.device.allreduce(whole[part], compress=compress, op=op, async_op=True))
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


def captured(rank: Rank) -> list[str]:
    """Two graphs of all-reduces of the same tensors, one launched twice; eager ones before and behind."""
    dense, want = rank.upload(numbers(4096, rank.rank)), total(rank, 4096)
    compressed, source = (rank.upload(gradient(SMALL, rank.rank, 7)) for _ in range(2))
    eager = rank.upload(gradient(SMALL, rank.rank, 8))
    wanted = [gradient(SMALL, rank.rank, 7), gradient(SMALL, rank.rank, 8)]
    for each in wanted:
        rank.host.allreduce(each, compress="bf16")
    rank.device.allreduce(eager, compress="bf16", async_op=True)
    work = rank.device.allreduce(compressed, compress="bf16", async_op=True)
    work.wait()
    rank.device.allreduce(dense, async_op=True).wait()
    graphs: list[Any] = []
    for _ in range(2):
        with rank.torch.capture() as made:
            rank.torch.copy([compressed], [source])
            works = [rank.device.allreduce(dense, async_op=True)]
            works.append(rank.device.allreduce(compressed, compress="bf16", async_op=True))
            for each_work in works:
                each_work.wait()
        graphs += made
    for graph in (graphs[0], graphs[0], graphs[1]):
        rank.torch.replay(graph)
    behind = rank.upload(numbers(64, rank.rank))
    rank.device.allreduce(behind)
    want = want * rank.world**3
    wrong = all_differ(rank, [compressed, eager, dense, behind], [*wanted, want, total(rank, 64)])
    for graph in graphs:
        rank.torch.forget(graph)
    return wrong


def in_known_memory(rank: Rank) -> list[str]:
    """Tensors in memory that NCCL knows, given back while a collective of them is under way."""
    wrong = []
    for i in range(2):
        tensor = rank.device.empty(SMALL)
        put(rank, [tensor], [gradient(SMALL, rank.rank, i)])
        want = gradient(SMALL, rank.rank, i)
        rank.host.allreduce(want, compress="bf16")
        rank.device.allreduce(tensor, compress="bf16", async_op=i == 1)
        if i == 0:
            wrong += all_differ(rank, [tensor], [want])
        del tensor
    return wrong


def in_windows(rank: Rank) -> list[str]:
    """Buckets that all ranks allocate together, beside memory of one rank alone; the first is given back while a
    collective of it is under way."""
    wrong: list[str] = []
    for i, compress in enumerate(("bf16", CODEC, None)):
        numel = (i + 1) * SMALL
        tensor = rank.device.bucket(numel)
        alone = rank.device.empty(64) if rank.rank == i % rank.world else None
        want = gradient(numel, rank.rank, i) if compress else numbers(numel, rank.rank)
        put(rank, [tensor], [want])
        work = rank.device.allreduce(tensor, compress=compress, flat=False, async_op=True)
        if compress:
            rank.host.allreduce(want, compress=compress)
        if i > 0:
            work.wait()
            wrong += all_differ(rank, [tensor], [want if compress else total(rank, numel)])
        del tensor, alone, work
    return wrong


def reducer(rank: Rank) -> list[str]:
    """Gradients of four buckets become complete in another order on each rank."""
    module = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(SMALL // 64, 64)) for _ in range(4))
    rank.torch.place(module)
    parameters = list(module)
    made = Reducer(module, ctx=rank.device, compress=CODEC, bucket_cap_mb=4 * SMALL / (1 << 20))
    on_host, wrong = Residual(), list[str]()
    for step in range(3):  # the third is the first for which no program has to be made
        given = [gradient(SMALL, rank.rank, 4 * step + i) for i in range(4)]
        for parameter, each in zip(parameters, given, strict=True):
            parameter.grad = rank.upload(each.view(-1, 64))
        for i in range(4):
            made.ready(parameters[(i + rank.rank) % 4])
        made.finalize()
        for layout in made.layouts:
            flat = torch.zeros(layout.numel)
            for span in layout.spans:
                flat[span.begin : span.end] = given[int(span.name)]
            rank.host.allreduce(flat, op="mean", compress=CODEC, residual=on_host, residual_key=layout.key)
            wrong += _gradients_differ(rank, parameters, layout.spans, flat)
        made.commit()
        on_host.commit()
    made.close()
    return wrong


def _gradients_differ(
    rank: Rank, parameters: Sequence[torch.Tensor], spans: Sequence[Any], want: torch.Tensor
) -> list[str]:
    wrong: list[str] = []
    for span in spans:
        grad = parameters[int(span.name)].grad
        if grad is None:
            wrong.append(f"value: gradient {span.name} is none")
        else:
            got = rank.download(grad).flatten()
            wrong += differ(f"gradient {span.name}", got, want[span.begin : span.end])
    return wrong
