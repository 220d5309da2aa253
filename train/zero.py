"""ZeRO stage 1: the replicas of a node share the optimizer's state out among themselves (arXiv 1910.02054).

1. lay out   all parameters in one flat buffer for each dtype; each parameter becomes a view of it
2. share     the buffer has a part for each of the node's replicas, which keeps state for, and updates, its part alone
3. gather    behind each applied step, all parts to all of them

Gradients are means on all replicas already, so nothing else is sent. Updates are element by element: they are the bits
of an optimizer that has everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from hybridcomm.groups import Grouping
from model.sharding import balanced

__all__ = ["SharedState"]

_LINE = 16
"""Elements that are never parted. Fused kernels may round what lies behind a tensor's last whole vector otherwise than
what lies in vectors, so every piece begins where a vector of the whole parameter begins."""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """The elements [begin, end) of a parameter, which this rank updates; ``tensor`` are these elements."""

    parameter: nn.Parameter
    begin: int
    end: int
    tensor: Tensor


class SharedState:
    """Which elements of ``parameters`` this rank's optimizer updates; ``group`` are the node's replicas.

    Moves the parameters' values into new memory. Give `pieces` to an optimizer that treats elements alike, and then
    `attach` it: its step takes gradients from the parameters, and all ranks of the group have to take it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: Grouping) -> None:
        self._group = group
        self._pieces: list[_Piece] = []
        self._parts: list[list[Tensor]] = []
        kinds: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            kinds.setdefault(parameter.dtype, []).append(parameter)
        for alike in kinds.values():
            self._lay_out(alike)

    @torch.no_grad()
    def _lay_out(self, parameters: Sequence[nn.Parameter]) -> None:
        group, dtype = self._group, parameters[0].dtype
        lines = [-(-parameter.numel() // _LINE) for parameter in parameters]
        flat: Tensor = group.empty(_LINE * sum(lines), dtype=dtype)  # type: ignore[assignment]
        parts = flat.zero_().split([_LINE * size for size in balanced(sum(lines), group.world_size)])
        self._parts.append(list(parts))
        begin = sum(len(part) for part in parts[: group.rank])
        end = begin + len(parts[group.rank])
        for parameter, line in zip(parameters, accumulate(lines, initial=0), strict=False):
            at, numel = _LINE * line, parameter.numel()
            flat[at : at + numel] = parameter.reshape(-1)
            parameter.data = flat[at : at + numel].view(parameter.shape)
            first, last = max(begin - at, 0), min(end - at, numel)
            if first < last:
                tensor = flat[at + first : at + last]
                self._pieces.append(_Piece(parameter=parameter, begin=first, end=last, tensor=tensor))

    @property
    def pieces(self) -> list[Tensor]:
        """What this rank's optimizer updates: views of the parameters' memory."""
        nothing = [parts[self._group.rank][:0] for parts in self._parts]  # optimizers refuse an empty list
        return [piece.tensor for piece in self._pieces] or nothing

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes ``optimizer``, which has the `pieces`, update the parameters of all ranks."""
        optimizer.register_step_pre_hook(lambda *_: self._take_gradients())
        optimizer.register_step_post_hook(lambda *_: self._gather())

    def _take_gradients(self) -> None:
        for piece in self._pieces:
            gradient = piece.parameter.grad
            piece.tensor.grad = None if gradient is None else gradient.reshape(-1)[piece.begin : piece.end]

    def _gather(self) -> None:
        for parts in self._parts:
            self._group.all_gather(parts, parts[self._group.rank])
        for piece in self._pieces:
            piece.tensor.grad = None  # else it would live until the next step

    def describe(self) -> str:
        """How much of the state this rank keeps."""
        mine = sum(piece.tensor.numel() for piece in self._pieces)
        every = sum(len(part) for parts in self._parts for part in parts)
        return (
            f"optimizer state: shared by {self._group.world_size} replicas in the node; "
            f"for {mine / 1e6:.2f} of {every / 1e6:.2f} M parameters on this rank"
        )
