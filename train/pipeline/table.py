"""The lists of a schedule as arrays, of all ranks one behind the other: where does each instruction stand?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import chain, pairwise, repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from train.pipeline.instructions import HEAD, Instruction, PipelineSchedule, instruction, peer
from train.pipeline.lines import LINE_OPS, OP, Numbers, lines_of

__all__ = ["Messages", "Numbering", "Table", "numbering"]


class Messages(NamedTuple):
    """Channel by channel, in the order in which they are sent.

    ``send``, ``receive``: the entries. ``number``: ``(row of Lines.channels) * microbatches + microbatch``.
    """

    channel: Numbers
    send: Numbers
    receive: Numbers
    number: Numbers


class Table:
    """Facts of each entry, in the order of the lists, and the other way round the place of each instruction.

    ``begin[rank]`` to ``begin[rank + 1]`` is a rank's list; ``rank``, ``op`` (its number), ``line`` and ``microbatch``
    are of each entry. ``others``: entries on no line that the facts call for: REDUCE, and what has no place in its
    list; their line is the one behind the last. ``reduces``: (entry, unit) of each REDUCE.

    ``place[op, unit, microbatch]``: the entry that does it first (a B is one of I and of W); where it is missing the
    number of entries, which is behind all.
    """

    def __init__(self, schedule: PipelineSchedule) -> None:
        self.schedule, self.lines = schedule, lines_of(schedule)
        self.begin = np.zeros(schedule.ranks + 1, np.intp)
        counts = np.fromiter(map(len, schedule.lists), np.intp, schedule.ranks)
        counts.cumsum(out=self.begin[1:])
        self.size = int(self.begin[-1])
        self.rank = np.arange(schedule.ranks).repeat(counts)
        book = numbering(schedule.placement, schedule.microbatches)
        codes = map(book.numbers.get, chain.from_iterable(schedule.lists), repeat(book.unknown))
        self.op, stage, self.microbatch = np.unravel_index(np.fromiter(codes, np.intp, self.size), book.shape)
        unit = stage + (stage == schedule.head) * self.rank if schedule.split_head else stage
        self.line: Numbers = self.op * self.lines.units + unit
        known = self.lines.called_for[self.op] & (self.lines.holder[unit] == self.rank)
        known &= self.microbatch < schedule.microbatches
        self.others: Numbers = np.flatnonzero(~known)
        self.line[self.others] = len(LINE_OPS) * self.lines.units
        self.microbatch[self.others] = 0
        self.place = self._places()
        self.reduces = list(self._reduces())

    def _places(self) -> Numbers:
        shape = (len(LINE_OPS), self.lines.units, self.schedule.microbatches)
        place = np.full((len(LINE_OPS) * self.lines.units + 1) * self.schedule.microbatches, self.size)
        keys = self.line * self.schedule.microbatches + self.microbatch
        place[keys[::-1]] = np.arange(self.size)[::-1]  # of several the last one written stays: the first
        out = place[: -self.schedule.microbatches].reshape(shape)
        for part in ("I", "W"):
            np.minimum(out[OP[part]], out[OP["B"]], out=out[OP[part]])
        return out

    def _reduces(self) -> Iterator[tuple[int, int]]:
        for index in self.others.tolist():
            rank, place = self.event(index)
            op, stage, *_ = self.schedule.lists[rank][place]
            unit = stage + rank if stage == self.schedule.head else stage
            if op == "REDUCE" and 0 <= unit < self.lines.units and self.lines.holder[unit] == rank:
                yield index, unit

    def event(self, index: int) -> tuple[int, int]:
        """(rank, place in its list) of an entry."""
        rank = int(self.rank[index])
        return rank, index - int(self.begin[rank])

    @property
    def by_line(self) -> Numbers:
        """``place`` with one row per line."""
        return self.place.reshape(-1, self.schedule.microbatches)

    @property
    def accumulates(self) -> Numbers:
        """By unit, where the gradients of each microbatch are added up."""
        stages = self.schedule.stages
        return np.concatenate((self.place[OP["W"], :stages], self.place[OP["HEAD_T"], stages:]))

    @cached_property
    def messages(self) -> Messages:
        """All that is sent, where nothing is missing."""
        channel, send, receive = self.lines.channels
        sends, receives = self.by_line[send].ravel(), self.by_line[receive].ravel()
        channel = channel.repeat(self.schedule.microbatches)
        order = (channel * (self.size + 1) + sends).argsort(kind="stable")
        return Messages(channel[order], sends[order], receives[order], order)

    def insert(
        self, at: Numbers, rank: Numbers, new: npt.NDArray[Any]
    ) -> tuple[tuple[Instruction, ...], ...]:
        """The lists with more entries: each of ``new`` on its ``rank``, before entry ``at`` (or at the rank's end).

        Of several before one entry that comes first which is given first.
        """
        order = (at + rank).argsort(kind="stable")  # a rank's end is not the next one's beginning
        flat = np.insert(self.entries(), at[order], new[order]).tolist()
        more = np.bincount(rank, minlength=self.schedule.ranks).cumsum()
        begin = (self.begin + np.append(0, more)).tolist()
        return tuple(tuple(flat[here:end]) for here, end in pairwise(begin))

    def entries(self) -> npt.NDArray[Any]:
        """The instructions themselves."""
        return np.fromiter(chain.from_iterable(self.schedule.lists), object, self.size)


class Numbering:
    """Every instruction on lines of a placement, of the microbatches below ``capacity``, and its number.

    ``instructions[op, stage, microbatch]``, the head as the last stage; its number is that of its place in there.
    ``unknown`` is behind them all.
    """

    def __init__(self, placement: tuple[int, ...], capacity: int) -> None:
        self.shape = (len(LINE_OPS) + 1, len(placement) + 1, capacity)
        self.instructions = np.full(self.shape, None, object)
        for op, stage, *peers in _rows(placement):
            row = [instruction(op, stage, microbatch, *peers) for microbatch in range(capacity)]
            self.instructions[OP[op], stage] = np.fromiter(row, object, capacity)
        flat = enumerate(self.instructions.ravel().tolist())
        self.numbers = {entry: number for number, entry in flat if entry is not None}
        self.unknown = len(LINE_OPS) * self.shape[1] * capacity


def numbering(placement: tuple[int, ...], microbatches: int) -> Numbering:
    """One that has at least so many microbatches; the next power of two, so that schedules share it."""
    return _numbering(placement, 1 << (microbatches - 1).bit_length())


@lru_cache(maxsize=16)
def _numbering(placement: tuple[int, ...], capacity: int) -> Numbering:
    return Numbering(placement, capacity)


def _rows(placement: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """(op, stage), and the peer of what has one, of all that stages and the head may do."""
    for stage in range(len(placement)):
        yield from ((op, stage) for op in ("F", "I", "W", "B"))
        for step, ops in ((-1, ("RECV_F", "SEND_I")), (1, ("SEND_F", "RECV_I"))):
            other = peer(placement, stage, step)
            if other >= 0:
                yield from ((op, stage, other) for op in ops)
    yield from ((op, len(placement)) for op in HEAD)
