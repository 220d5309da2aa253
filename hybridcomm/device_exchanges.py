"""Collectives on GPUs that are several of NCCL's calls in one group: gather, scatter, all_to_all, and coalesced ones.

Parts go straight from rank to rank, each rank's own through NCCL too. Where sizes may differ by rank the hosts exchange
them first, as they do for tensors of their own, so that all ranks see a disagreement alike; devices are not waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridcomm.collectives_copy import rows_by_rank
from hybridcomm.device_collectives import DeviceCollectives, _buffers, _plan
from hybridcomm.device_plan import START, Operation, Touch
from hybridcomm.device_reduction import shared
from hybridcomm.errors import DataTypeError, PlanMismatchError, UnsupportedError
from hybridcomm.stream_provider import view_of

if TYPE_CHECKING:
    import torch

    from hybridcomm.device_coalesce import GroupedCall

__all__ = ["DeviceExchanges"]


class DeviceExchanges(DeviceCollectives):
    """One rank's part in them; `hybridcomm.device_context.DeviceContext` has the rest."""

    def gather(
        self, t: Any, gather_list: Any = None, dst: int = 0, *, async_op: bool = False, stream: Any = None
    ) -> Any:
        """Copies every rank's ``t`` into rank ``dst``'s ``gather_list[rank]``; the other ranks pass no list."""
        if not self.takes(t):
            return self.host.gather(t, gather_list, dst, async_op=async_op)
        own, parts = self._rooted(t, gather_list, "gather_list", dst)
        messages = [(True, own, dst), *((False, part, rank) for rank, part in enumerate(parts))]
        return self._messages(messages, async_op, stream, [t, *parts], self._name("gather", own, dst))

    def scatter(
        self, t: Any, scatter_list: Any = None, src: int = 0, *, async_op: bool = False, stream: Any = None
    ) -> Any:
        """Copies rank ``src``'s ``scatter_list[rank]`` into every rank's ``t``; the other ranks pass no list."""
        if not self.takes(t):
            return self.host.scatter(t, scatter_list, src, async_op=async_op)
        own, parts = self._rooted(t, scatter_list, "scatter_list", src)
        messages = [(False, own, src), *((True, part, rank) for rank, part in enumerate(parts))]
        return self._messages(messages, async_op, stream, [t, *parts], self._name("scatter", own, src))

    def all_to_all(self, out_list: Any, in_list: Any, *, async_op: bool = False, stream: Any = None) -> Any:
        """Copies ``in_list[r]`` to rank r, which gets it in its ``out_list`` at this rank's place; sizes may differ."""
        if not isinstance(in_list, (list, tuple)) or not in_list:
            raise UnsupportedError("in_list: expected a list of one tensor per rank")
        if not self.takes(in_list[0]):
            return self.host.all_to_all(out_list, in_list, async_op=async_op)
        given, wanted = self._parts(in_list, "in_list"), self._parts(out_list, "out_list")
        self._agree_on_sizes(wanted, given)
        return self._swap(wanted, given, async_op, stream, [*out_list, *in_list])

    def all_to_all_single(
        self,
        out: Any,
        t: Any,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        *,
        async_op: bool = False,
        stream: Any = None,
    ) -> Any:
        """Part r of ``t`` goes to rank r; parts lie in ``out`` by sender. ``out`` is not ``t``.

        Split sizes count rows, as on hosts; None: equal parts. Parts that are equal on all ranks are one call of NCCL's
        where it has that (2.28), else its sends and receives.
        """
        if not self.takes(out):
            return self.host.all_to_all_single(
                out, t, output_split_sizes, input_split_sizes, async_op=async_op
            )
        wanted = self._split(out, output_split_sizes, "output_split_sizes", "out")
        given = self._split(t, input_split_sizes, "input_split_sizes", "t")
        equal = True
        if output_split_sizes is not None or input_split_sizes is not None:
            equal = self._agree_on_sizes(wanted, given)
        elif [part.numel() for part in wanted] != [part.numel() for part in given]:
            raise UnsupportedError("all_to_all_single: without split sizes out and t must be of one size")
        if equal and given[0].numel() and "ncclAlltoAll" in self._newer:
            source, target = view_of(t, self.provider, "t"), view_of(out, self.provider, "out")
            self._check_one_dtype([source, target])
            return self._one("all_to_all", source, target, given[0].numel(), async_op, stream)
        return self._swap(wanted, given, async_op, stream, [out, t])

    # -- in common -----------------------------------------------------------------------------------------

    def _rooted(self, t: Any, arrays: Any, name: str, root: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Flat views of ``t`` and of the list that ``root`` alone passes."""
        self._check_rank(root)
        own = view_of(t, self.provider)
        self._dtype(own)
        if self.host.rank != root:
            if arrays:
                raise UnsupportedError(f"{name}: only rank {root} passes one, this is rank {self.host.rank}")
            return own, []
        if not isinstance(arrays, (list, tuple)):
            raise UnsupportedError(f"{name}: rank {root} passes a list of one tensor per rank")
        parts = self._parts(arrays, name)
        for rank, part in enumerate(parts):
            if part.numel() != own.numel() or part.dtype != own.dtype:
                raise UnsupportedError(
                    f"{name}[{rank}] has {part.numel()} {part.dtype}, t {own.numel()} {own.dtype}"
                )
        return own, parts

    def _name(self, kind: str, own: torch.Tensor, root: int) -> str:
        """Ranks with other sizes call something else, by what they compare in debug mode."""
        return f"{kind} [{own.numel()} {self._dtype(own)}, rank {root}]"

    def _swap(
        self,
        wanted: Sequence[torch.Tensor],
        given: Sequence[torch.Tensor],
        async_op: bool,
        stream: Any,
        tensors: Sequence[Any],
    ) -> Any:
        self._check_one_dtype([*wanted, *given])
        messages = []
        for peer, (into, part) in enumerate(zip(wanted, given, strict=True)):
            messages += [(False, into, peer)] if into.numel() else []
            messages += [(True, part, peer)] if part.numel() else []
        return self._messages(messages, async_op, stream, tensors, "all_to_all")

    @staticmethod
    def _check_one_dtype(tensors: Sequence[torch.Tensor]) -> None:
        if any(each.dtype != tensors[0].dtype for each in tensors):
            raise DataTypeError("all_to_all: all tensors must be of one dtype")

    def _split(self, whole: Any, sizes: Sequence[int] | None, name: str, what: str) -> list[torch.Tensor]:
        flat = view_of(whole, self.provider, what)
        sizes = rows_by_rank(tuple(whole.shape), sizes, self.host.world_size, name, what)
        rows = sum(sizes)
        row = flat.numel() // rows if rows else 0
        ends = [0, *accumulate(size * row for size in sizes)]
        return [flat[begin:end] for begin, end in pairwise(ends)]

    def _agree_on_sizes(self, wanted: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> bool:
        """Whether all parts of all ranks are equal. Raises `PlanMismatchError`, on all ranks, where one expects other
        than it gets; hosts wait for it."""
        world = self.host.world_size
        own = np.array([part.numel() for part in (*given, *wanted)], np.int64)
        every = np.empty(own.size * world, np.int64)
        self.host.all_gather(every, own)
        sent, expected = every.reshape(world, 2, world).transpose(1, 0, 2)
        if (sent != expected.T).any():
            i, j = (int(index) for index in np.argwhere(sent != expected.T)[0])
            raise PlanMismatchError(
                f"all_to_all: rank {i} sends {sent[i, j]} elements to rank {j}, which expects {expected[j, i]}"
            )
        return bool((sent == sent[0, 0]).all())

    def _grouped(self, calls: Sequence[GroupedCall], tensors: Sequence[Any], async_op: bool) -> Any:
        """The calls of a coalescing block, as one NCCL group."""
        kind, dtype = calls[0].kind, self._dtype(calls[0].source)
        fields = sorted(calls[0].fields.items())
        places = tuple((c.source.data_ptr(), c.target.data_ptr(), c.numel) for c in calls)
        key = ("grouped", kind, dtype, *fields, *places)
        program = self._programs.get(key)
        if program is None:
            operations = [
                Operation(
                    kind=kind,
                    word="exchange",
                    stream="inter",
                    step=0,
                    touches=_touches(call.source, call.target),
                    after=(START,) if i == 0 else (),
                    group=0,
                    source=call.source.data_ptr(),
                    target=call.target.data_ptr(),
                    count=call.numel,
                    dtype=dtype,
                    comm=self._comms[tuple(range(self.host.world_size))],
                    **call.fields,
                )
                for i, call in enumerate(calls)
            ]
            counts = [call.numel for call in calls]
            facts = f"grouped {kind} {counts} {dtype} {shared(calls[0].fields)}"
            text = self._text(f"{len(calls)} coalesced {kind}", sum(counts), dtype)
            buffers = _buffers({f"{i}": t for i, t in enumerate(tensors)})
            program = self._remember(key, _plan(text, facts, operations, buffers), ())
        return self._start(program, tensors, async_op, None, f"coalesced {kind}")


def _touches(source: torch.Tensor, target: torch.Tensor) -> tuple[Touch, ...]:
    ends = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (source, target)]
    written = Touch(*ends[1], True)
    return (written,) if ends[0] == ends[1] else (Touch(*ends[0], False), written)
