"""A tied item table of which several pipeline ranks hold copies: each copy needs the sum of their gradients.

First and last stage each have the whole table (of their tp share); with a split head every rank has the rows that it
scores, and the first stage all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hybridcomm.groups import Group
from model.vocab import ItemTable

__all__ = ["sum_copies", "sum_shards"]

_TAG = 3  # beside the pipeline's F, I and the head's parts


def sum_copies(table: ItemTable | None, pair: Group) -> None:
    """In place, on both ranks of ``pair``: the gradients of first and last stage's table are summed."""
    for parameter in table.parameters() if table is not None else ():
        pair.allreduce(_gradient_of(parameter))


def sum_shards(
    own: ItemTable, table: ItemTable | None, pipeline: Group, *, first: int, rows: Sequence[int]
) -> None:
    """In place, on all ranks of ``pipeline``: rows scored on a rank are embedded on ``first``, in a copy of their own.

    ``own`` are the rows that this rank scores, ``rows[rank]`` how many each does; ``table`` the first stage's, on rank
    ``first`` alone. Both ranks send their gradient of these rows and add the other's: the same two numbers, so the same
    bits.
    """
    me = pipeline.rank
    grads = [_gradient_of(own.embedding)]
    if table is not None:
        grads = list(_gradient_of(table.embedding).split(list(rows)))
        mine = grads[me].clone()
        grads[me] += _gradient_of(own.embedding)
        _gradient_of(own.embedding).add_(mine)
    peers = [first] if table is None else [rank for rank in range(pipeline.world_size) if rank != me]
    works, rooms = [], []
    for peer in peers:
        grad = grads[0] if table is None else grads[peer]
        rooms.append((grad, torch.empty_like(grad)))
        works += [pipeline.isend(grad, peer, _TAG), pipeline.irecv(rooms[-1][1], peer, _TAG)]
    for work in works:
        work.wait()
    for grad, room in rooms:
        grad.add_(room)
    if own.features is not None:
        copies = [own.text_projection.weight] + ([] if table is None else [table.text_projection.weight])
        total = torch.stack([_gradient_of(copy) for copy in copies]).sum(0)
        pipeline.allreduce(total)
        for copy in copies:
            _gradient_of(copy).copy_(total)


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    """``.grad``, made of zeros where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
