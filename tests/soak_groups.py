"""Groups, splits, messages and coalesced calls for the soak: what is made of the other kinds, or goes beside them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybridcomm import P2POp, batch_isend_irecv, irecv, isend
from tests.soak_codecs import COMPRESSED
from tests.soak_operations import (
    COLLECTIVES,
    DTYPES,
    Draw,
    Kind,
    Pending,
    holds,
    numbers,
    own_numbers,
    reduced_numbers,
    tensor_of,
)

__all__ = ["GROUPED"]

TAGS = 3
"""Few: messages of one tag must not be mixed up."""
LEFT_ALONE = Pending(work=None, check=lambda: True)
"""Of a rank that takes no part."""


@dataclass(frozen=True, kw_only=True)
class Several:
    """Works that are waited for together."""

    works: Sequence[Any]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def dice_of(draw: Draw) -> random.Random:
    """The same on all ranks."""
    return random.Random(draw.pick)


def within(group: Any, draw: Draw, kinds: Sequence[Kind]) -> Pending:
    """One of ``kinds`` among the members of ``group``."""
    dice = dice_of(draw)
    kind = dice.choices(kinds, [kind.weight for kind in kinds])[0]
    return kind.start(group, dataclasses.replace(draw, pick=dice.getrandbits(32)))


def group_of_some(ctx: Any, draw: Draw) -> Pending:
    """Any ranks in any order; groups of successive calls overlap. Now and then a group of a group."""
    dice = dice_of(draw)
    ranks = dice.sample(range(ctx.world_size), dice.randint(1, ctx.world_size))
    group = ctx.group(ranks)
    if dice.random() < 0.3:
        group = group.group(dice.sample(range(len(ranks)), dice.randint(1, len(ranks))))
    if not group.is_member:
        return LEFT_ALONE
    return within(group, draw, (*COLLECTIVES, *COMPRESSED, MESSAGES, COALESCED))


def split(ctx: Any, draw: Draw) -> Pending:
    """Used once and dropped; some ranks join no part."""
    dice = dice_of(draw)
    colors = [dice.choice([0, 1, None]) for _ in range(ctx.world_size)]
    keys = [dice.randrange(ctx.world_size) for _ in range(ctx.world_size)]
    group = ctx.split(colors[ctx.rank], keys[ctx.rank])
    members = [rank for rank, color in enumerate(colors) if color is not None and color == colors[ctx.rank]]
    if group is None:
        return Pending(work=None, check=lambda: not members)
    one = within(group, draw, COLLECTIVES)
    want = tuple(sorted(members, key=lambda rank: (keys[rank], rank)))
    return Pending(work=one.work, check=lambda: group.ranks == want and one.check())


def messages(ctx: Any, draw: Draw) -> Pending:
    """A few between any two ranks, started one by one or as a batch."""
    if ctx.world_size == 1:
        return LEFT_ALONE
    dice = dice_of(draw)
    dtype = draw.choose(DTYPES)
    ops, received = [], []
    for place in range(dice.randint(1, 6)):
        src, dst = dice.sample(range(ctx.world_size), 2)
        tag, numel = dice.randrange(TAGS), draw.numel // (place + 1)
        content = numbers(src, ctx.world_size, numel, draw.number + place, dtype)
        if ctx.rank == src:
            ops.append(P2POp(isend, tensor_of(content, dtype), dst, ctx, tag))
        elif ctx.rank == dst:
            got = torch.zeros(numel, dtype=getattr(torch, dtype))
            ops.append(P2POp(irecv, got, src, ctx, tag))
            received.append((got, content))
    if draw.async_op:
        works = batch_isend_irecv(ops)
    else:
        works = [getattr(ctx, op.op.__name__)(op.tensor, op.peer, op.tag) for op in ops]
    return Pending(
        work=Several(works=works),
        check=lambda: all(holds(got, content, dtype) for got, content in received),
    )


def allreduces_coalesced(ctx: Any, draw: Draw) -> Pending:
    """Small tensors, which are packed, and large ones."""
    dtype, world = draw.choose(DTYPES), ctx.world_size
    sizes = [draw.numel // part for part in (1, 3, 50, 400)]
    tensors = [tensor_of(own_numbers(ctx, draw, dtype, numel=numel), dtype) for numel in sizes]
    with ctx.coalescing(async_op=draw.async_op) as block:
        for each in tensors:
            ctx.allreduce(each)
    return Pending(
        work=block,
        check=lambda: all(
            holds(each, reduced_numbers(world, each.numel(), draw.number, dtype, "sum"), dtype)
            for each in tensors
        ),
    )


MESSAGES = Kind(name="messages", start=messages, weight=3)
COALESCED = Kind(name="allreduce, coalesced", start=allreduces_coalesced)
GROUPED = (
    Kind(name="group", start=group_of_some, weight=4),
    Kind(name="split", start=split),
    MESSAGES,
    COALESCED,
)
