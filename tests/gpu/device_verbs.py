"""What GPU ranks do by the module's verbs, as a user writes it: a scenario whose values are checked by the host's."""

from __future__ import annotations

from typing import Any

import torch

import hybridcomm
from hybridcomm.point_to_point import P2POp
from hybridcomm.residual import Residual
from hybridcomm.selftest.rank import all_differ, differ, numbers, total
from hybridcomm.selftest.under_way import CODEC, SMALL
from tests.gpu.device_ranks import Rank, gradient

__all__ = ["all_to_alls", "coalesced", "verbs"]


def verbs(rank: Rank) -> list[str]:
    """Each verb once, of tensors on the GPU and of the context, then in groups of two."""
    host = rank.host
    even = hybridcomm.split(rank.rank % 2, group=host)
    assert even is not None
    wrong = [*_reductions(rank, host), *_copies(rank, host, 1), *_copies(rank, even, 0)]
    return [*wrong, *_messages(rank, host), *_messages(rank, even)]


def _reductions(rank: Rank, group: Any) -> list[str]:
    want, on_host, on_device = gradient(SMALL, rank.rank, 0), Residual(), Residual()
    compressed = rank.upload(want)
    hybridcomm.allreduce(want, "mean", group, compress=CODEC, residual=on_host)
    hybridcomm.allreduce(compressed, "mean", group, compress=CODEC, residual=on_device)
    dense, reduced = rank.upload(numbers(64, rank.rank)), rank.upload(numbers(64, rank.rank))
    work = hybridcomm.all_reduce(dense, group=group, async_op=True)
    hybridcomm.reduce(reduced, 1, group=group)
    assert work is not None
    work.wait()
    sums = total(rank, 64)
    kept = sums if rank.rank == 1 else numbers(64, rank.rank)
    return all_differ(rank, [compressed, dense, reduced], [want, sums, kept])


def _copies(rank: Rank, group: Any, root: int) -> list[str]:
    """Of tensors whose size is the host's rank of whom they are."""
    me, world = group.rank, group.world_size
    of = range(world) if group.members is None else group.members.ranks
    every = [numbers(32, job) for job in of]
    mine = rank.upload(every[me])

    def empty(*sizes: int) -> list[torch.Tensor]:
        return [rank.upload(torch.zeros(size)) for size in sizes]

    spread = rank.upload(every[me])
    hybridcomm.broadcast(spread, root, group)
    (flat,), parts = empty(32 * world), empty(*[32] * world)
    hybridcomm.all_gather_into_tensor(flat, mine, group)
    hybridcomm.all_gather(parts, mine, group)
    (scattered, listed), size = empty(32 // world, 32 // world), 32 // world
    hybridcomm.reduce_scatter_tensor(scattered, mine, group=group)
    hybridcomm.reduce_scatter(listed, list(mine.split(size)), group=group)
    gathered = empty(*[32] * world) if me == root else None
    hybridcomm.gather(mine, gathered, root, group)
    (given,) = empty(32)
    hybridcomm.scatter(given, [rank.upload(each + 1) for each in every] if me == root else None, root, group)
    (equal,), (uneven,), lists = empty(32), empty(sum(me + r for r in range(world))), empty(*[32] * world)
    hybridcomm.all_to_all_single(equal, mine, group=group)
    rows = [me + r for r in range(world)]
    hybridcomm.all_to_all_single(uneven, mine[: sum(rows)], rows, rows, group=group)
    hybridcomm.all_to_all(lists, [mine] * world, group=group)
    summed = torch.stack(every).sum(0)[me * size : (me + 1) * size]
    got = [spread, flat, *parts, scattered, listed, given, equal, uneven, *lists, *(gathered or [])]
    starts = [sum(r + q for q in range(me)) for r in range(world)]
    want = [
        every[root], torch.cat(every), *every, summed, summed, every[me] + 1,
        torch.cat([each[me * size : (me + 1) * size] for each in every]),
        torch.cat([each[at : at + r + me] for r, (each, at) in enumerate(zip(every, starts, strict=True))]),
        *every, *(every if me == root else []),
    ]  # fmt: skip
    return all_differ(rank, got, want)


def all_to_alls(rank: Rank) -> list[str]:
    """Equal parts, without split sizes and with them, twice under way together; then parts of which rank 0 alone has
    equal ones, so that it must ask the others what they have."""
    me, world = rank.rank, rank.world
    equal, mixed = [6] * world, [[4 if 0 in (r, q) else 6 for q in range(world)] for r in range(world)]
    wrong = []
    for given in (None, equal, mixed):
        rows = [list(equal) for _ in range(world)] if given is not mixed else mixed
        sent = [numbers(sum(rows[r]), r) for r in range(world)]
        split = rows[me] if given is not None else None  # what is sent is as much as what comes
        outs = [rank.upload(torch.zeros(sum(rows[me]))) for _ in range(2)]
        source = rank.upload(sent[me])
        works = [rank.device.all_to_all_single(out, source, split, split, async_op=True) for out in outs]
        for work in works:
            work.wait()
        starts = [sum(rows[r][:me]) for r in range(world)]
        want = torch.cat([sent[r][starts[r] : starts[r] + rows[r][me]] for r in range(world)])
        wrong += all_differ(rank, [*outs, source], [want, want, sent[me]])
    return wrong


def _messages(rank: Rank, group: Any) -> list[str]:
    """Around in a batch, with one of the host in it; then from the first to the last rank."""
    me, world = group.rank, group.world_size
    of = range(world) if group.members is None else group.members.ranks
    left, right = (me - 1) % world, (me + 1) % world
    out, into = rank.upload(numbers(48, of[me])), rank.upload(torch.zeros(48))
    host_out, host_into = numbers(8, of[me]), torch.zeros(8)
    ops = [P2POp(hybridcomm.isend, out, right, group), P2POp(hybridcomm.irecv, into, left, group)]
    ops += [P2POp(hybridcomm.isend, host_out, right, group), P2POp(hybridcomm.irecv, host_into, left, group)]
    works = hybridcomm.batch_isend_irecv(ops)
    for work in works:
        work.wait()
    wrong = [] if len(works) == 2 else [f"{len(works)} works of a batch on the host and on the device"]
    last = rank.upload(numbers(16, of[me]))
    if me == 0:
        hybridcomm.send(last, world - 1, group=group)
        hybridcomm.isend(last, world - 1, group=group).wait()
    elif me == world - 1:
        hybridcomm.irecv(last, 0, group=group).wait()
        wrong += [] if hybridcomm.recv(last, 0, group=group) == 0 else ["recv() names another sender"]
    want = numbers(16, of[0] if me == world - 1 else of[me])
    wrong += differ("a message of the host", host_into, numbers(8, of[left]))
    return wrong + all_differ(rank, [into, last], [numbers(48, of[left]), want])


def coalesced(rank: Rank) -> list[str]:
    """Blocks of all-reduces, all_gathers and reduce_scatters, in a group too, one with a handle."""
    host, sizes = rank.host, (1, 64, 1 << 15)
    pair = host.group([0, 1]) if rank.rank < 2 else host.group([2])
    tensors = [rank.upload(numbers(size, rank.rank)) for size in sizes]
    with hybridcomm.coalescing(host, async_op=True) as block:
        for each in tensors:
            hybridcomm.all_reduce(each, "sum", host)
    block.wait()
    of = pair.members.ranks
    mine = rank.upload(numbers(12, rank.rank))
    gathered = [rank.upload(torch.zeros(12 * pair.world_size)) for _ in range(2)]
    with hybridcomm.coalescing(pair):
        for each in gathered:
            hybridcomm.all_gather_into_tensor(each, mine, pair)
    scattered = [rank.upload(torch.zeros(12 // pair.world_size)) for _ in range(2)]
    with hybridcomm.coalescing(pair):
        for each in scattered:
            hybridcomm.reduce_scatter_tensor(each, mine, "mean", pair)
    means = torch.stack([numbers(12, job) for job in of]).mean(0)
    part = means[pair.rank * scattered[0].numel() :][: scattered[0].numel()]
    want = [total(rank, size) for size in sizes]
    want += [torch.cat([numbers(12, job) for job in of])] * 2 + [part] * 2
    return all_differ(rank, [*tensors, *gathered, *scattered], want)
