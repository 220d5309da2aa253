"""Cases of the collectives that are one call of NCCL's, of messages, and of groups; whole numbers, so all is exact."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybridcomm.device_plan import NCCL_TYPES
from hybridcomm.errors import GroupError
from hybridcomm.reduction import premul_sum
from hybridcomm.selftest.rank import Rank, all_differ, differ, gradient, near, numbers, total
from hybridcomm.selftest.reductions import Body

__all__ = [
    "DTYPES",
    "MOVED",
    "NARROW_RANKS",
    "awaited",
    "groups",
    "means",
    "messages",
    "moves",
    "reduces",
    "scaled",
]

DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int32", "int64")
"""That NCCL can both move and sum."""
MOVED = tuple(NCCL_TYPES)
NARROW_RANKS = 127
"""Up to so many, sums of zeros and ones fit into int8."""
PART = 1031  # elements of a part; prime, so that nothing is aligned


def _spread(numel: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Whole numbers up to 8, which every dtype holds; another sequence for each rank."""
    generator = torch.Generator().manual_seed(7919 + rank)
    return torch.randint(0, 9, (numel,), generator=generator).to(torch.float32).to(dtype)


def _ones(numel: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(104729 + rank)
    return torch.randint(0, 2, (numel,), generator=generator).to(dtype)


def _plain(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """As bytes: tensors of fp8 cannot be compared."""
    return [each.contiguous().view(torch.uint8) for each in tensors]


def moves(name: str) -> Body:
    """broadcast from every end, all_gather into one tensor, in place and into a list of unequal ones, all_to_all."""
    dtype = getattr(torch, name)

    def body(rank: Rank) -> list[str]:
        device, world, me = rank.device, rank.world, rank.rank
        every = [_spread(PART, r, dtype) for r in range(world)]
        mine = rank.upload(every[me])
        casts = [rank.upload(every[me]) for _ in range(2)]
        for tensor, source in zip(casts, (0, world - 1), strict=True):
            device.broadcast(tensor, source)
        whole = rank.upload(torch.zeros(PART * world).to(dtype))
        device.all_gather_into_tensor(whole, mine)
        in_place = rank.upload(
            torch.cat([each if r == me else torch.zeros_like(each) for r, each in enumerate(every)])
        )
        device.all_gather_into_tensor(in_place, in_place[me * PART : (me + 1) * PART])
        lengths = [PART - 7 * (r % 3) for r in range(world)]
        listed = [rank.upload(torch.zeros(n).to(dtype)) for n in lengths]
        device.all_gather(listed, mine[: lengths[me]])
        mixed = rank.upload(torch.zeros(PART * world).to(dtype))
        sent = [_spread(PART * world, 1000 + r, dtype) for r in range(world)]
        device.all_to_all_single(mixed, rank.upload(sent[me]))
        shares = torch.cat([each[me * PART : (me + 1) * PART] for each in sent])
        got = [mine, *casts, whole, in_place, *listed, mixed]
        want = [every[me], every[0], every[-1], torch.cat(every), torch.cat(every)]
        want += [each[:n] for each, n in zip(every, lengths, strict=True)]
        return all_differ(rank, _plain(got), _plain([*want, shares]))

    return body


def reduces(name: str) -> Body:
    """reduce to both ends, reduce_scatter of a tensor and of a list of unequal ones, all-reduces by every op."""
    dtype = getattr(torch, name)

    def body(rank: Rank) -> list[str]:
        device, world, me = rank.device, rank.world, rank.rank
        whole = PART * world
        every = torch.stack([_ones(whole, r, dtype) for r in range(world)])
        sums = every.double().sum(0).to(dtype)
        mine, wrong = every[me].clone(), list[str]()
        for root in {0, world - 1}:
            tensor = rank.upload(mine)
            device.reduce(tensor, root)
            wrong += all_differ(rank, [tensor], [sums if me == root else mine])
        part = rank.upload(torch.zeros(PART).to(dtype))
        device.reduce_scatter_tensor(part, rank.upload(mine))
        lengths = [PART - 7 * (r % 3) for r in range(world)]
        own = rank.upload(torch.zeros(lengths[me]).to(dtype))
        given = [rank.upload(mine[r * PART : r * PART + n]) for r, n in enumerate(lengths)]
        device.reduce_scatter(own, given)
        share = sums[me * PART : (me + 1) * PART]
        wrong += all_differ(rank, [part, own], [share, share[: lengths[me]]])
        twos = torch.where(torch.arange(whole) % world == me, 2, 1).to(dtype)  # one factor per element
        for op, values, want in (
            ("sum", mine, sums),
            ("max", mine, every.amax(0)),
            ("min", mine, every.amin(0)),
            ("product", twos, torch.full_like(twos, 2)),
        ):
            tensor = rank.upload(values)
            device.allreduce(tensor, op=op)
            wrong += differ(op, rank.download(tensor), want)
        return wrong

    return body


def messages(rank: Rank) -> list[str]:
    """Both ways at once, one way after another, and every collective that is one call."""
    device, world, me = rank.device, rank.world, rank.rank
    numel, part = 32 * world, 32
    mine = numbers(numel, me)
    out, into = rank.upload(mine), rank.upload(torch.zeros(numel))
    left, right = (me - 1) % world, (me + 1) % world
    device.batch([(True, out, right), (False, into, left)]).wait()
    wrong = [*differ("a message", rank.download(into), numbers(numel, left))]
    spread, mixed = rank.upload(torch.zeros(numel)), rank.upload(torch.zeros(numel))
    device.all_to_all_single(mixed, out)
    shares = torch.cat([numbers(numel, r)[me * part : (me + 1) * part] for r in range(world)])
    device.broadcast(spread if me else out, 0)
    gathered, own = rank.upload(torch.zeros(numel * world)), rank.upload(torch.zeros(part))
    device.all_gather_into_tensor(gathered, into)
    device.reduce_scatter_tensor(own, out)
    reduced = rank.upload(mine)
    device.reduce(reduced, 1)
    sums = total(rank, numel)
    want = [
        shares,
        numbers(numel, 0) if me else torch.zeros(numel),
        torch.cat([numbers(numel, (r - 1) % world) for r in range(world)]),
        sums[me * part : (me + 1) * part],
        sums if me == 1 else mine,
    ]
    return wrong + all_differ(rank, [mixed, spread, gathered, own, reduced], want)


def means(rank: Rank) -> list[str]:
    """Of both dtypes, of all ranks and, by the route, of nodes: each has a factor of its own."""
    world, numel = rank.world, 1024 * rank.world
    mine = numbers(numel, rank.rank)
    singles, doubles, routed = rank.upload(mine), rank.upload(mine.double()), rank.upload(mine)
    rank.device.allreduce(singles, op="mean", flat=True)
    rank.device.allreduce(doubles, op="mean", flat=True)
    rank.device.allreduce(routed, op="mean", flat=False)
    part, begin = rank.upload(torch.zeros(1024)), 1024 * rank.rank
    rank.device.reduce_scatter_tensor(part, rank.upload(mine), op="mean")
    want = total(rank, numel).double() / world
    scale = sum(
        (numbers(numel, r).abs().double() for r in range(world)), torch.zeros(numel, dtype=torch.double)
    )
    wrong: list[str] = []
    for what, tensor in (("float32", singles), ("float64", doubles), ("by the route", routed)):
        wrong += near(what, rank.download(tensor), want, scale / world, world)
    own = slice(begin, begin + 1024)
    return wrong + list(near("a share", rank.download(part), want[own], scale[own] / world, world))


def scaled(rank: Rank) -> list[str]:
    """Sums of inputs that each rank has a factor of its own for, one of them 1: the host's bits, of every dtype. The
    last tensor is rank 0's alone, whose products have to be rounded before they are summed."""
    wrong: list[str] = []
    for name in ("float32", "float64", "float16", "bfloat16", "int32", "int64", "int8", "uint8"):
        dtype, numel = getattr(torch, name), 64 * rank.world
        small = numbers(numel, rank.rank).abs().remainder(2)
        odd = torch.arange(numel) % 60 + 2049 if rank.rank == 0 else torch.zeros(numel)
        for values, mine in (
            (small, 1.0),
            (small, -1.0 - rank.rank % 2),
            (odd, 0.75 if dtype.is_floating_point else 3.0),
        ):
            op = premul_sum(1.0 if rank.rank == rank.world - 1 else mine)
            want, part = [values.to(dtype).clone() for _ in range(2)], torch.zeros(64).to(dtype)
            tensors, own = [rank.upload(each) for each in want], rank.upload(part)
            rank.host.reduce_scatter_tensor(part, want[0], op=op)
            rank.device.reduce_scatter_tensor(own, tensors[0], op=op)
            rank.host.allreduce(want[0], op=op)
            rank.device.allreduce(tensors[0], op=op)
            rank.host.reduce(want[1], 1, op=op)
            rank.device.reduce(tensors[1], 1, op=op)
            found = all_differ(rank, [*tensors, own], [*want, part])
            wrong += [f"{name} by {op.factor}: {what}" for what in found]
    return wrong


def groups(rank: Rank) -> list[str]:
    """Every second rank, and all of them backwards, between calls of all; whoever is not in a group is told."""
    numel, wrong = 4099, list[str]()
    for members in (range(0, rank.world, 2), range(rank.world - 1, -1, -1)):
        group = rank.device.group(list(members))
        if rank.rank in members:
            tensor, first = (rank.upload(numbers(numel, rank.rank)) for _ in range(2))
            group.allreduce(tensor)
            group.broadcast(first, 0)
            sums = sum((numbers(numel, r) for r in members), torch.zeros(numel))
            wrong += all_differ(rank, [tensor, first], [sums, numbers(numel, members[0])])
            if len(group.topology.nodes) > 1:
                want, compressed = (gradient(1 << 13, rank.rank, 0) for _ in range(2))
                rank.host.group(list(members)).allreduce(want, compress="int8")
                on_device = rank.upload(compressed)
                group.allreduce(on_device, compress="int8")
                wrong += all_differ(rank, [on_device], [want])
        else:
            wrong += _refused(rank, group)
        everyone = rank.upload(numbers(numel, rank.rank))
        rank.device.allreduce(everyone)
        wrong += all_differ(rank, [everyone], [total(rank, numel)])
    return wrong


def _refused(rank: Rank, group: object) -> list[str]:
    try:
        group.allreduce(rank.upload(torch.zeros(16)))  # type: ignore[attr-defined]
    except GroupError:
        return []
    return ["a group's collective on a rank that is not in it did not raise GroupError"]


def awaited(rank: Rank) -> list[str]:
    """What the host has waited for is there for streams that wait for nothing."""
    wrong: list[str] = []
    for flat in (True, False):
        tensor = rank.upload(numbers(1 << 18, rank.rank))
        rank.torch.delay(2000)
        work = rank.device.allreduce(tensor, flat=flat, async_op=True)
        work.synchronize()
        with rank.torch.other_stream():
            wrong += differ("read behind synchronize()", rank.download(tensor), total(rank, 1 << 18))
        if not work.is_completed():
            wrong.append("is_completed() is False behind synchronize()")
    return wrong
